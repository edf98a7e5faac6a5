// What a disk store shares with its payloads and engines. PRIVATE to tiers/.
//
// Thread-safe. The engines hold a plain pointer: close() ends their threads before the core can go.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <vector>

#include "tiers/disk_engine.hpp"
#include "tiers/disk_store.hpp"
#include "tiers/engine_set.hpp"
#include "tiers/extent_placement.hpp"
#include "tiers/write_limit.hpp"

namespace spillover {

class DiskStoreCore final : public DiskPieceOwner {
 public:
  explicit DiskStoreCore(const DiskStoreOptions& options);
  ~DiskStoreCore();
  DiskStoreCore(const DiskStoreCore&) = delete;
  DiskStoreCore& operator=(const DiskStoreCore&) = delete;

  // Counts size_bytes as written; throws DiskFullError past the limit.
  void account_write(size_t size_bytes);
  void cancel_write(size_t size_bytes) { write_limit_.take_back(size_bytes); }
  std::vector<Extent> allocate(size_t size_bytes) { return placement_->allocate(size_bytes); }
  void release(const std::vector<Extent>& extents) noexcept;
  void submit(std::vector<DiskPiece> pieces, WriteGate gate) noexcept;
  EngineSet& engines() { return *engines_; }
  void close() noexcept;
  void check_open() const;
  DiskStats stats() const;
  // Of those who wait for a ticket of this store; outlives it.
  const std::shared_ptr<WaitCounters>& waits() const { return waits_; }
  int descriptor(size_t folder) const { return files_.at(folder)->descriptor(); }

 private:
  std::vector<BlockFile> block_files() const;
  void start(const DiskPiece& piece) noexcept override;
  void finish(DiskPiece& piece, std::exception_ptr error) noexcept override;

  const DiskStoreOptions options_;
  const pid_t owner_;                                // Threads do not survive a fork.
  std::vector<std::unique_ptr<ScratchFile>> files_;  // Constant after construction.
  std::unique_ptr<ExtentPlacement> placement_;       // Constant after construction.
  std::unique_ptr<EngineSet> engines_;               // Constant after construction.
  std::atomic<bool> is_closed_{false};
  WriteLimit write_limit_;
  std::atomic<uint64_t> read_bytes_{0};
  std::atomic<uint64_t> pending_extents_{0};
  const std::shared_ptr<WaitCounters> waits_ = std::make_shared<WaitCounters>();
};

}  // namespace spillover
