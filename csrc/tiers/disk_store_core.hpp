// What a disk store shares with its payloads and engines. PRIVATE to tiers/.
//
// Thread-safe. The engines hold a plain pointer: close() ends their threads before the core can go.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "tiers/disk_engine.hpp"
#include "tiers/disk_store.hpp"
#include "tiers/extent_placement.hpp"
#include "tiers/write_gates.hpp"

namespace spillover {

class DiskStoreCore final : public DiskPieceOwner {
 public:
  explicit DiskStoreCore(const DiskStoreOptions& options);
  ~DiskStoreCore();
  DiskStoreCore(const DiskStoreCore&) = delete;
  DiskStoreCore& operator=(const DiskStoreCore&) = delete;

  // Counts size_bytes as written; throws DiskFullError past the limit.
  void account_write(size_t size_bytes);
  void cancel_write(size_t size_bytes) { written_bytes_ -= size_bytes; }
  std::vector<Extent> allocate(size_t size_bytes) { return placement_->allocate(size_bytes); }
  void release(const std::vector<Extent>& extents) noexcept;
  // Blocks while a queue is full. A piece that cannot be queued fails, which its ticket tells:
  // others of its request may be under way, so the caller's memory must be held all the same.
  void submit(std::vector<DiskPiece> pieces, WriteGate gate) noexcept;
  size_t register_memory(std::byte* address, size_t size_bytes);
  void unregister_memory(std::byte* address) noexcept;
  void close() noexcept;
  void check_open() const;
  DiskStats stats() const;
  // Of those who wait for a ticket of this store; outlives it.
  const std::shared_ptr<WaitCounters>& waits() const { return waits_; }
  int descriptor(size_t folder) const { return folders_.at(folder)->file.descriptor(); }

 private:
  struct Folder {
    explicit Folder(ScratchFile&& opened) : file(std::move(opened)), counters(file.folder()) {}
    ScratchFile file;
    FolderCounters counters;
    std::unique_ptr<DiskEngine> engine;
  };

  void make_engines();
  void make_uring_engines();
  void make_thread_engines();
  void hand_over(DiskPiece&& piece, std::exception_ptr error) noexcept;
  void finish(DiskPiece& piece, std::exception_ptr error) noexcept override;

  const DiskStoreOptions options_;
  const pid_t owner_;                                 // Threads do not survive a fork.
  std::vector<std::unique_ptr<Folder>> folders_;      // Constant after construction.
  std::unique_ptr<ExtentPlacement> placement_;        // Constant after construction.
  DiskEngineKind engine_ = DiskEngineKind::kThreads;  // Constant after construction.
  std::string engine_notes_;                          // Constant after construction.
  std::unique_ptr<WriteGates> gates_;                 // Constant after construction.
  std::mutex memory_mutex_;
  std::map<std::byte*, size_t> registered_memory_;  // Guarded by memory_mutex_. None overlap.
  std::mutex close_mutex_;                          // Guards the threads' joining.
  std::atomic<bool> is_closed_{false};
  std::atomic<uint64_t> written_bytes_{0};
  std::atomic<uint64_t> read_bytes_{0};
  std::atomic<uint64_t> pending_extents_{0};
  const std::shared_ptr<WaitCounters> waits_ = std::make_shared<WaitCounters>();
};

}  // namespace spillover
