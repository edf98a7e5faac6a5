// A disk engine of a few threads, each of which moves one extent at a time with pread and pwrite.
// It works everywhere. PRIVATE to tiers/.
#pragma once

#include <cstddef>
#include <thread>
#include <vector>

#include "base/bounded_queue.hpp"
#include "tiers/disk_engine.hpp"

namespace spillover {

class ThreadEngine final : public DiskEngine {
 public:
  // owner outlives the engine, and so does the open file.
  ThreadEngine(const BlockFile& file, DiskPieceOwner& owner, size_t thread_count,
               size_t queue_length_max);
  ~ThreadEngine() override { close(); }

  bool submit(DiskPiece&& piece) override { return queue_.push(std::move(piece)); }
  void close() noexcept override;

 private:
  void serve() noexcept;

  const BlockFile file_;
  DiskPieceOwner& owner_;
  BoundedQueue<DiskPiece> queue_;
  std::vector<std::thread> threads_;
};

}  // namespace spillover
