// The state of a durable store. PRIVATE to tiers/.
//
// Thread-safe. Lock order: exclusive_mutex_, which one of commit, rollback and close holds, then
// mutex_, a leaf that is held over nothing that waits for the disk.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "tiers/durable_opening.hpp"
#include "tiers/durable_store.hpp"
#include "tiers/engine_set.hpp"
#include "tiers/write_limit.hpp"

namespace spillover {

class DurableStoreCore final : public DiskPieceOwner {
 public:
  explicit DurableStoreCore(const DurableStoreOptions& options);
  ~DurableStoreCore();
  DurableStoreCore(const DurableStoreCore&) = delete;
  DurableStoreCore& operator=(const DurableStoreCore&) = delete;

  std::shared_ptr<Ticket> write(const DurableStore::Part& part, std::byte* data, WriteGate gate);
  std::shared_ptr<Ticket> read(const DurableStore::Part& part, std::byte* data,
                               DurableContents contents);
  uint64_t commit(const DurableExtra& extra);
  void rollback();
  void verify();
  void close() noexcept;

  EngineSet& engines() { return *engines_; }
  const DurableLayout& layout() const { return *store_.layout; }
  uint64_t extent_bytes() const { return store_.shape.extent_bytes_max; }
  bool is_committed(size_t entry) const;
  DurableExtra extra() const;
  DurableStats stats() const;
  void check_open() const;

 private:
  // Of the slot that is not committed.
  enum class Fresh : uint8_t { kNothing, kWriting, kWritten, kFailed };
  struct State {
    std::array<uint32_t, 2> crc32c{};
    std::array<uint32_t, 2> readers{};
    uint8_t committed = kNoSlot;
    Fresh fresh = Fresh::kNothing;

    size_t fresh_slot() const { return committed == 0 ? 1 : 0; }
  };

  // While it lives no write is under way and none begins.
  class Quiet;

  Extent extent_at(size_t index, size_t slot) const;
  size_t slot_to_read(size_t index, DurableContents contents) const;
  void check_writable(size_t index) const;
  void check_not_failed() const;
  void finish(DiskPiece& piece, std::exception_ptr error) noexcept override;

  DurableManifest next_manifest(const DurableExtra& extra) const;
  void check_in_place() const;
  void make_durable(const DurableManifest& manifest, uint64_t sequence);
  void sync_written() const;
  void take_over(DurableManifest&& manifest);

  const DurableStoreOptions options_;
  const pid_t owner_;
  OpenDurable store_;                   // record and manifest: guarded by mutex_.
  std::unique_ptr<EngineSet> engines_;  // Constant after construction.
  WriteLimit write_limit_;
  std::atomic<bool> is_closed_{false};
  std::atomic<uint64_t> read_bytes_{0};
  std::atomic<uint64_t> pending_extents_{0};
  const std::shared_ptr<WaitCounters> waits_ = std::make_shared<WaitCounters>();
  WaitCounters commits_;

  std::mutex exclusive_mutex_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  // Guarded by mutex_.
  std::vector<State> states_;   // Of each extent.
  std::vector<bool> unsynced_;  // Folders that were written to since their last sync.
  size_t pending_writes_ = 0;   // Extents.
  bool is_quiet_ = false;       // Writes have to wait.
  std::exception_ptr failure_;  // Why the store takes no writes any more.
};

}  // namespace spillover
