// The engines of a store's folders, one each, and the gates in front of them.
//
// Thread-safe. The destructor closes; in a forked child, where the threads are not there, it leaves
// everything as it is. PRIVATE to tiers/.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "tiers/block_file.hpp"
#include "tiers/disk_engine.hpp"
#include "tiers/disk_store.hpp"
#include "tiers/folder_counters.hpp"
#include "tiers/write_gates.hpp"

namespace spillover {

struct EngineOptions {
  DiskEngineKind kind = DiskEngineKind::kAuto;
  size_t threads_per_folder = 4;  // Of the engine that has threads.
  size_t queue_length_max = 64;   // Extents waiting, a folder.
};

// Throws ConfigError for numbers that cannot be.
void check_engine_options(const EngineOptions& options);

class EngineSet {
 public:
  // The open files and owner outlive this. Throws StorageError where the engine that is asked for
  // cannot be used.
  EngineSet(const std::vector<BlockFile>& files, DiskPieceOwner& owner,
            const EngineOptions& options);
  ~EngineSet();
  EngineSet(const EngineSet&) = delete;
  EngineSet& operator=(const EngineSet&) = delete;

  // Blocks while a queue is full. A piece that cannot be queued fails, which its owner is told:
  // others of its request may be under way, so the caller's memory must be held all the same.
  void submit(std::vector<DiskPiece> pieces, WriteGate gate) noexcept;

  // For the owner, first thing in finish(): counters, trace and virtual clock hear of it.
  void note_end(const DiskPiece& piece, bool has_failed) noexcept;
  const FolderCounters& counters(size_t folder) const { return *counters_[folder]; }

  // As DiskStore's.
  size_t register_memory(std::byte* address, size_t size_bytes);
  void unregister_memory(std::byte* address) noexcept;

  // Refuses new pieces, waits for those it has, ends the threads. May be called again.
  void close() noexcept;

  DiskEngineKind kind() const { return kind_; }        // Never kAuto.
  const std::string& notes() const { return notes_; }  // Why it is not io_uring, or lacks some.
  bool is_owned() const;                               // False in a forked child.

 private:
  void make_engines(const std::vector<BlockFile>& files);
  void make_uring_engines(const std::vector<BlockFile>& files);
  void make_thread_engines(const std::vector<BlockFile>& files);
  void hand_over(DiskPiece&& piece, std::exception_ptr error) noexcept;

  DiskPieceOwner& owner_;
  const EngineOptions options_;
  const pid_t process_;                                    // Threads do not survive a fork.
  DiskEngineKind kind_ = DiskEngineKind::kThreads;         // Constant after construction.
  std::string notes_;                                      // Constant after construction.
  std::vector<std::unique_ptr<FolderCounters>> counters_;  // Constant after construction.
  std::vector<std::unique_ptr<DiskEngine>> engines_;       // Constant after construction.
  std::unique_ptr<WriteGates> gates_;                      // Constant after construction.
  std::mutex memory_mutex_;
  std::map<std::byte*, size_t> registered_memory_;  // Guarded by memory_mutex_. None overlap.
  std::mutex close_mutex_;                          // Guards the threads' joining.
};

}  // namespace spillover
