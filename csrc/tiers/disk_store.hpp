// Scratch storage in one or more folders, written and read asynchronously.
//
// A payload is stored once, read any number of times and gives its space back when the last holder
// drops it. It is cut into extents of at most extent_bytes_max, which go to the folders by
// turns, the faster ones more often, so that one large payload uses every disk. Each folder has a
// bounded queue and an engine: io_uring where the kernel has it and allows it, else a few threads
// that block.
//
// Every method may be called from any thread. write() and read() block only while a folder's queue
// is full; close() and the destructor block until every request is over. The memory of a request
// must stay valid, and unchanged, until its ticket is done.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "tiers/extent_io.hpp"
#include "tiers/folder_counters.hpp"
#include "tiers/scratch_file.hpp"
#include "tiers/ticket.hpp"

namespace spillover {

enum class DiskEngineKind {
  kAuto,  // io_uring where it works, else threads.
  kIoUring,
  kThreads,
};

struct DiskStoreOptions {
  std::vector<std::string> folders;
  DiskEngineKind engine = DiskEngineKind::kAuto;
  uint64_t limit_bytes = UINT64_MAX;        // On the space of all files together.
  uint64_t write_limit_bytes = UINT64_MAX;  // On bytes ever written, to spare flash memory.
  size_t threads_per_folder = 4;            // Of the engine that has threads.
  size_t queue_length_max = 64;             // Extents waiting, a folder.
  size_t extent_bytes_max = size_t{8} << 20;
  Preallocation preallocation = Preallocation::kReserve;
};

struct DiskFolderStats {
  std::string folder;
  bool is_direct;            // The file system takes O_DIRECT.
  uint64_t used_bytes;       // Taken by payloads, whole blocks.
  uint64_t file_bytes;       // Up to the last extent.
  double bandwidth_bytes_s;  // Measured, of both directions; 0 before anything was moved.
  DiskDirectionStats writes;
  DiskDirectionStats reads;
};

struct DiskStats {
  uint64_t written_bytes;    // As requested, of writes accepted.
  uint64_t read_bytes;       // As requested, of reads that went well.
  uint64_t used_bytes;       // Taken by payloads, whole blocks.
  uint64_t file_bytes;       // Up to the last extent, all folders.
  uint64_t pending_extents;  // Queued or moving.
  bool is_direct;            // Every folder takes O_DIRECT.
  DiskEngineKind engine;     // The one in use, never kAuto.
  std::string engine_notes;  // Why it is not io_uring, or what that lacks; empty where all is well.
  std::vector<DiskFolderStats> folders;
  WaitStats waits{};  // For tickets that were not done yet.
};

class DiskStoreCore;

// What was stored by one write. Thread-safe; shared by its holders and pending requests.
class DiskPayload {
 public:
  enum class State { kWriting, kStored, kFailed };

  DiskPayload(std::shared_ptr<DiskStoreCore> core, size_t size_bytes, std::vector<Extent> extents);
  ~DiskPayload();
  DiskPayload(const DiskPayload&) = delete;
  DiskPayload& operator=(const DiskPayload&) = delete;

  size_t size_bytes() const { return size_bytes_; }
  State state() const { return state_.load(std::memory_order_acquire); }
  // Constant once state() is kStored; empty once it is kFailed.
  const std::vector<Extent>& extents() const { return extents_; }

 private:
  friend class DiskStoreCore;
  friend class DiskStore;

  const std::shared_ptr<DiskStoreCore> core_;
  const size_t size_bytes_;
  // While writing, whoever finishes a piece touches its extent only.
  std::vector<Extent> extents_;
  std::atomic<size_t> extents_left_;  // To be written.
  std::atomic<bool> has_failed_{false};
  std::atomic<State> state_{State::kWriting};
};

// Waits until a copy has arrived in the memory of a write, which nobody touches before. Runs on a
// thread of its own, see Note [Gates]; more than once.
using WriteGate = std::function<void()>;

struct WriteRequest {
  std::shared_ptr<DiskPayload> payload;
  std::shared_ptr<Ticket> ticket;
};

class DiskStore {
 public:
  // Throws ConfigError, or StorageError when a folder, or the engine that is asked for, cannot be
  // used.
  explicit DiskStore(const DiskStoreOptions& options);
  ~DiskStore();
  DiskStore(const DiskStore&) = delete;
  DiskStore& operator=(const DiskStore&) = delete;

  // Throws DiskFullError when no folder has room or a limit is reached, StateError when
  // closed. Later errors are the ticket's; the payload's space is then free again.
  WriteRequest write(const void* data, size_t size_bytes, WriteGate gate = nullptr);

  // data has room for the payload's size. Throws StateError for a payload that is not stored yet,
  // failed, or is another store's. The ticket's errors: StorageError, CorruptDataError.
  std::shared_ptr<Ticket> read(std::shared_ptr<DiskPayload> payload, void* data);

  // Tells of memory that many requests will use, such as a pool's: with io_uring the kernel need
  // not look up its pages for each transfer. It must stay mapped until it is unregistered, or the
  // store is closed; no request may use it while it is unregistered. The bytes that could be
  // registered, in the folder with the fewest: 0 with threads, and less than all where the limit on
  // locked memory is small; all of the memory can be used all the same. Blocks. Throws ConfigError
  // where it overlaps with memory that is registered already.
  size_t register_memory(void* address, size_t size_bytes);
  void unregister_memory(void* address) noexcept;

  // Refuses new requests, waits for the pending ones, ends the threads. The files, and with them
  // all payloads, go when the last payload is dropped. May be called twice.
  void close();

  DiskStats stats() const;
  // For tests, which damage the file through it.
  int descriptor(size_t folder) const;

 private:
  std::shared_ptr<DiskStoreCore> core_;
};

}  // namespace spillover
