// A disk engine of one thread, which keeps many transfers of its folder's file under way with
// io_uring and computes checksums meanwhile.
//
// Note [Chunks]. An extent is moved in chunks of kChunkBytes, several at once, so that one extent
// alone keeps the device busy and its checksum is computed while others of its chunks move. Virtual
// disks want many bytes at once: one told that transfers were over only when it had no more. With
// 64 MiB of writes under way we wrote at 0.91 of the best plain loop, which had 256 MiB, and at
// 0.97 with as many. Of reads fewer are under way: callers have memory for few, and the device is
// to have the next ones while those that are over are summed. Memory that is aligned to blocks is
// given to the device as it is. The rest goes through bounce buffers, which are smaller chunks.
//
// Note [The device first]. Checksums are owed, not computed on the way: a chunk that is written is
// handed over first and summed while the device works on it (its memory does not change until the
// request is over); a chunk that was read is summed when the device has what it can have of the
// next ones. The thread looks for results after each sum. So the device waits for no checksum, as
// long as they are computed faster than it moves bytes; where they are not, kDueBytesMax bounds
// what is owed, and with it how long a small request waits for the sums of large ones.
//
// Note [One place to sleep]. The thread waits for the ring alone. submit() wakes it through an
// eventfd that the ring polls; a delay that a test has planned is a timeout in the ring. So neither
// holds up the other requests.
//
// Everything but the public methods is the ring thread's. PRIVATE to tiers/.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <future>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/bounded_queue.hpp"
#include "base/file_descriptor.hpp"
#include "tiers/disk_engine.hpp"
#include "tiers/file_operations.hpp"
#include "tiers/io_uring.hpp"
#include "tiers/uring_buffers.hpp"

namespace spillover {

class UringEngine final : public DiskEngine {
 public:
  static constexpr size_t kChunkBytes = size_t{4} << 20;
  static constexpr size_t kChunksMax = 64;                          // Under way at once.
  static constexpr size_t kDueBytesMax = kChunksMax * kChunkBytes;  // Whose sums are owed, about.
  static constexpr size_t kReadingBytesMax = size_t{64} << 20;      // Under way, about.
  static constexpr size_t kRequestsMax = 32;                        // Extents under way at once.

  // owner outlives the engine, and so does the open file. Throws StorageError where io_uring cannot
  // be used here.
  UringEngine(const BlockFile& file, DiskPieceOwner& owner, size_t queue_length_max);
  ~UringEngine() override;

  bool submit(DiskPiece&& piece) override;
  size_t register_memory(std::byte* address, size_t size_bytes) override;
  void unregister_memory(std::byte* address) noexcept override;
  void close() noexcept override;

  // What this machine does not let us have; empty where all is well.
  const std::string& notes() const { return notes_; }

 private:
  struct Request;
  struct Chunk;
  // What another thread has the ring thread do between requests.
  using Command = std::packaged_task<size_t()>;
  using Requests = std::list<Request>;

  void serve(std::promise<void>& ready) noexcept;
  void set_up();
  void run();

  size_t command(std::function<size_t()> what);
  void obey() noexcept;

  bool take_pieces();
  void begin(DiskPiece& piece) noexcept;
  void start_chunks() noexcept;
  bool start_chunk(Requests::iterator place) noexcept;
  void issue(Chunk& chunk) noexcept;
  void hand_over(Chunk& chunk) noexcept;
  bool advance(Chunk& chunk, ssize_t result) noexcept;
  void end_chunk(Chunk& chunk, std::exception_ptr error) noexcept;
  void owe_sum(Request& request, size_t chunk) noexcept;
  void compute_sum() noexcept;
  void finish_requests() noexcept;
  void finish(Request& request) noexcept;

  void enter() noexcept;
  void submit_batch() noexcept;
  bool handle_results() noexcept;
  void handle(const IoUring::Result& result) noexcept;
  void give_up(int native_error) noexcept;
  void wake() noexcept;
  size_t running_chunks() const { return kChunksMax - free_chunks_.size(); }

  const BlockFile file_;
  DiskPieceOwner& owner_;
  BoundedQueue<DiskPiece> queue_;
  std::mutex commands_mutex_;
  std::deque<Command> commands_;  // Guarded by commands_mutex_, as is
  bool takes_commands_ = true;    // this; false once the thread will not look again.
  FileDescriptor wakeup_;         // An eventfd.
  // Whether submit() must wake the thread: set before it looks at the queue for the last time.
  std::atomic<bool> is_sleeping_{false};
  std::string notes_;  // Constant after construction.

  std::unique_ptr<IoUring> ring_;
  Requests requests_;
  std::vector<Chunk> chunks_;  // Its index is the tag of its transfer.
  std::vector<size_t> free_chunks_;
  std::unique_ptr<UringBuffers> buffers_;
  size_t reading_bytes_ = 0;  // Of the chunks under way.
  size_t due_bytes_ = 0;      // Of all requests' chunks whose sums are due.
  int broken_error_ = 0;      // Of the ring as a whole: nothing works any more.

  std::thread thread_;
};

}  // namespace spillover
