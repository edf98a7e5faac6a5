// What a disk store shares with its payloads and I/O threads. PRIVATE to tiers/.
//
// Thread-safe. The I/O threads hold a plain pointer: close() joins them before the core can go.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "base/bounded_queue.hpp"
#include "tiers/disk_store.hpp"
#include "tiers/extent_space.hpp"
#include "tiers/work_annotation.hpp"

namespace spillover {

class DiskStoreCore {
 public:
  explicit DiskStoreCore(const DiskStoreOptions& options);
  ~DiskStoreCore();
  DiskStoreCore(const DiskStoreCore&) = delete;
  DiskStoreCore& operator=(const DiskStoreCore&) = delete;

  enum class Direction { kWrite, kRead };

  // One extent of a request.
  struct Piece {
    Direction direction;
    std::shared_ptr<DiskPayload> payload;
    size_t extent;
    size_t size_bytes;
    std::byte* data;  // Only read from in a write.
    std::shared_ptr<Ticket> ticket;
    std::shared_ptr<WriteGate> gate;  // Null for none.
    WorkId work = 0;                  // What the virtual clock calls it.
  };

  // Counts size_bytes as written; throws DiskFullError past the limit.
  void account_write(size_t size_bytes);
  void cancel_write(size_t size_bytes) { written_bytes_ -= size_bytes; }
  std::vector<Extent> allocate(size_t size_bytes);
  void release(const std::vector<Extent>& extents) noexcept;
  // Blocks while the folder's queue is full. A piece that cannot be queued fails, which its ticket
  // tells: others of its request may be under way, so the caller's memory must be held all the
  // same.
  void submit(Piece piece, size_t folder) noexcept;
  void close() noexcept;
  void check_open() const;
  DiskStats stats() const;
  int descriptor(size_t folder) const { return folders_.at(folder)->file.descriptor(); }

 private:
  struct Folder {
    Folder(ScratchFile&& opened, size_t queue_length_max)
        : file(std::move(opened)), queue(queue_length_max) {}
    std::mutex mutex;  // Guards space and file.reserve(), which is a system call.
    ScratchFile file;
    ExtentSpace space;
    BoundedQueue<Piece> queue;
    std::vector<std::thread> threads;
  };

  Extent allocate_extent(size_t size_bytes);
  void serve(Folder& folder) noexcept;
  void run(Folder& folder, Piece& piece, ExtentIo& io);
  void finish(Piece& piece, std::exception_ptr error) noexcept;

  const DiskStoreOptions options_;
  const pid_t owner_;                             // Threads do not survive a fork.
  std::vector<std::unique_ptr<Folder>> folders_;  // Constant after construction.
  std::mutex close_mutex_;                        // Guards the threads' joining.
  std::atomic<bool> is_closed_{false};
  std::atomic<size_t> next_folder_{0};
  std::atomic<uint64_t> written_bytes_{0};
  std::atomic<uint64_t> read_bytes_{0};
  std::atomic<uint64_t> pending_extents_{0};
};

}  // namespace spillover
