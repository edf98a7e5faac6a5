// Counters of a transfer engine, and the places where its threads stand still.
//
// Thread-safe. Shared by an engine and its tickets. In a trace a batch of copies is a span from
// where the engine puts it on a stream to where its mark was found passed, on a track a direction;
// the disk store has its own; a Stall is a span of the thread that waits.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>

#include "trace/span.hpp"

namespace spillover {

// What a thread of the program waited for.
enum class StallCause {
  kHostBudget,  // host memory that is free, or can be made free
  kDisk,        // bytes that come from the disk
  kCopy,        // copies to end: a ticket's, or so that less device memory is held
};
inline constexpr size_t kStallCauses = 3;

struct TransferCounters {
  std::atomic<uint64_t> out_bytes{0};  // Copied from the device, in transfers that were started.
  std::atomic<uint64_t> in_bytes{0};
  std::atomic<uint64_t> out_transfers{0};  // Calls of put(), copies from the device.
  std::atomic<uint64_t> in_transfers{0};
  std::atomic<uint64_t> written_bytes{0};  // To disk, in writes that went well.
  std::atomic<uint64_t> read_bytes{0};
  std::atomic<uint64_t> prefetched_bytes{0};  // Of those, ahead of a fetch.
  std::atomic<uint64_t> host_hits{0};         // Chunks fetched that the host had, or was getting.
  std::atomic<uint64_t> host_misses{0};       // Chunks whose fetch had to go to the disk.
  std::atomic<uint64_t> evicted_bytes{0};     // Host copies given up because the disk has them.
  std::atomic<uint64_t> disk_errors{0};       // Requests that failed, whoever heard of it.
  std::array<std::atomic<uint64_t>, kStallCauses> stalls{};
  std::array<std::atomic<uint64_t>, kStallCauses> stall_ns{};
};

inline constexpr std::array<TraceLabel, kStallCauses> kStallLabels{{
    {"wait for host memory", "transfer"},
    {"wait for the disk", "transfer"},
    {"wait for a copy", "transfer"},
}};

// Counts the time from here to the end of its scope, and puts it in the trace.
class Stall {
 public:
  Stall(TransferCounters& counters, StallCause cause)
      : counters_(counters),
        cause_(static_cast<size_t>(cause)),
        span_(kStallLabels[static_cast<size_t>(cause)]) {}
  ~Stall() {
    const auto elapsed = std::chrono::steady_clock::now() - start_;
    ++counters_.stalls[cause_];
    counters_.stall_ns[cause_] += static_cast<uint64_t>(
        std::chrono::duration_cast<std::chrono::nanoseconds>(elapsed).count());
  }
  Stall(const Stall&) = delete;
  Stall& operator=(const Stall&) = delete;

 private:
  TransferCounters& counters_;
  const size_t cause_;
  const TraceSpan span_;
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace spillover
