// A disk engine of one thread, which keeps many transfers of its folder's file under way with
// io_uring and computes checksums meanwhile.
//
// Note [Chunks]. An extent is moved in chunks of kChunkBytes, several at once, so that one extent
// alone keeps the device busy and its checksum is computed while others of its chunks move. Memory
// that is aligned to blocks is given to the device as it is. The rest goes through bounce buffers,
// which are registered with the kernel as far as the limit on locked memory (ulimit -l) allows; so
// is memory that register_memory() names, which spares the kernel to look up its pages each time.
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
#include <map>
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

namespace spillover {

class UringEngine final : public DiskEngine {
 public:
  static constexpr size_t kChunkBytes = size_t{512} << 10;
  static constexpr size_t kChunksMax = 32;                    // Under way at once.
  static constexpr size_t kBouncesMax = 8;                    // Buffers of a chunk each.
  static constexpr size_t kRequestsMax = 32;                  // Extents under way at once.
  static constexpr size_t kRegionsMax = 256;                  // Parts of registered memory.
  static constexpr size_t kRegionBytesMax = size_t{1} << 30;  // Of each; the kernel's limit.

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
  struct Region {
    std::byte* owner;  // The address that was registered, of which this is a part.
    size_t size_bytes;
    uint32_t index;  // In the kernel's table.
  };
  // What another thread has the ring thread do between requests.
  using Command = std::packaged_task<size_t()>;
  using Requests = std::list<Request>;

  void serve(std::promise<void>& ready) noexcept;
  void set_up();
  void register_bounces();
  void run();

  size_t command(std::function<size_t()> what);
  void obey() noexcept;
  size_t add_regions(std::byte* address, size_t size_bytes);
  void remove_regions(std::byte* owner) noexcept;
  int buffer_of(const std::byte* data, size_t size_bytes) const noexcept;

  bool take_pieces();
  void begin(DiskPiece& piece);
  void start_chunks();
  bool start_chunk(Requests::iterator place);
  void issue(Chunk& chunk) noexcept;
  void hand_over(Chunk& chunk) noexcept;
  bool advance(Chunk& chunk, ssize_t result) noexcept;
  void end_chunk(Chunk& chunk, std::exception_ptr error) noexcept;
  void finish_requests() noexcept;
  void finish(Request& request) noexcept;

  void sleep() noexcept;
  void submit_batch() noexcept;
  void handle_results() noexcept;
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
  BlockMemory bounces_;
  std::vector<size_t> free_bounces_;
  bool has_table_ = false;  // For regions; their indices come after the bounce buffers'.
  std::map<std::byte*, Region> regions_;  // By their addresses.
  std::vector<uint32_t> free_regions_;
  size_t registered_bounces_ = 0;  // The first ones.
  int broken_error_ = 0;           // Of the ring as a whole: nothing works any more.

  std::thread thread_;
};

}  // namespace spillover
