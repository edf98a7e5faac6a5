// Parts of the transfer engine that several of its files use. PRIVATE to transfer/.
#pragma once

#include "base/error.hpp"
#include "driver/context.hpp"
#include "transfer/transfer_engine.hpp"

namespace spillover {

// Changes a chunk's residency and keeps the sums of bytes true. Called with the mutex held.
template <class Change>
void TransferEngine::change(Chunk& chunk, Change change) {
  const auto count = [&](auto add) {
    if (chunk.residency.is_dirty() && !chunk.residency.is_dropped()) add(dirty_bytes_);
    if (chunk.residency.disk() == DiskCopy::kWriting) add(writing_bytes_);
    if (chunk.residency.host() == HostCopy::kReading) add(reading_bytes_);
  };
  count([&](size_t& bytes) { bytes -= chunk.size_bytes; });
  change(chunk.residency);
  count([&](size_t& bytes) { bytes += chunk.size_bytes; });
}

// A call under way: close() waits for it. Throws StateError once the engine is closed. Driver calls
// in its scope leave captures on other streams alone.
class TransferEngine::ActiveCall {
 public:
  explicit ActiveCall(TransferEngine& engine) : engine_(engine) {
    const Lock lock(engine_.mutex_);
    if (engine_.is_closed_) throw StateError("the transfer engine is closed");
    ++engine_.active_calls_;
  }
  ~ActiveCall() {
    const Lock lock(engine_.mutex_);
    --engine_.active_calls_;
    engine_.changed_.notify_all();
  }
  ActiveCall(const ActiveCall&) = delete;
  ActiveCall& operator=(const ActiveCall&) = delete;

 private:
  TransferEngine& engine_;
  const RelaxedCaptureScope relaxed_;
};

}  // namespace spillover
