// One folder of a durable store: its lock, and the store's file in it by name.
//
// Not thread-safe but for file(). Errors are StorageError with folder and errno unless a method
// says otherwise. PRIVATE to tiers/.
//
// Note [Lock of a durable store]. Whoever has the lock file's lock (flock) may write; the kernel
// takes the lock back when the process ends, however it does, while a process id in a file would
// lie across containers and network file systems. A forked child would inherit the file and with it
// the lock, and keep that when its parent is killed, so its copy is closed as it begins. Children
// that are made past fork() have one, so close() unlocks rather than closes only. Who deletes a
// store removes the lock file as well, so whoever gets a lock looks whether the name still means
// this file.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "base/file_descriptor.hpp"
#include "base/unshared_file.hpp"
#include "tiers/block_file.hpp"
#include "tiers/file_operations.hpp"
#include "trace/tracks.hpp"

namespace spillover {

inline constexpr const char* kDurableName = "spillover.durable";
inline constexpr const char* kDurableNewName = "spillover.durable.new";  // Being made or removed.
inline constexpr const char* kDurableLockName = "spillover.durable.lock";

class DurableFolder {
 public:
  enum class WhenMissing { kMake, kFail };

  // Opens the folder. A missing one is made (mode 0700), durably, or an error.
  DurableFolder(const std::string& path, WhenMissing when_missing);
  ~DurableFolder() { close(); }
  DurableFolder(const DurableFolder&) = delete;
  DurableFolder& operator=(const DurableFolder&) = delete;

  const std::string& path() const { return path_; }

  // Makes the lock file where it is missing. An error with EWOULDBLOCK where somebody has it.
  void lock();
  // Gives the lock back and closes everything. May be called again.
  void close() noexcept;
  // In a forked child: closes without giving back its parent's lock.
  void leave_to_parent() noexcept;

  bool has(const char* name) const;
  // Makes kDurableNewName with room for size_bytes; false where the file system cannot promise the
  // room, which the file has in size then. DiskFullError where there is none.
  bool make(uint64_t size_bytes);
  // False where there is no such file.
  bool open(const char* name);
  // Renames what make() made, durably.
  void publish();
  // Undoes publish(), durably.
  void retire();
  // Removes the name where it is; durable after sync_folder().
  void remove(const char* name);
  void sync_folder() const;
  // As the function below.
  void sync(SyncKind kind) const;
  // Whether kDurableName still is this file. An error where that cannot be seen.
  bool is_in_place() const;

  // Of the open file.
  BlockFile file() const { return {file_.number(), path_, "durable store"}; }
  // False where the file system refuses O_DIRECT.
  bool is_direct() const { return is_direct_; }

 private:
  friend void sync(std::span<const DurableFolder* const> folders, SyncKind kind);

  void sync_file(SyncKind kind) const;
  std::string path_of(const char* name) const { return path_ + "/" + name; }
  [[noreturn]] void fail(const std::string& what, int native_error) const;
  int open_raw(const char* name, int flags) const;
  void open_blocks(const char* name, int flags);
  bool is_same(const char* name, int file) const;

  std::string path_;
  FileDescriptor directory_;
  UnsharedFile lock_;
  FileDescriptor file_;
  bool is_direct_ = true;
  mutable LazyTrack flushes_;
};

// Flushes the open files of folders, which may be on different disks, all at once, and blocks until
// the last is done. Throws the first folder's error of those that have one; the others are flushed
// all the same.
void sync(std::span<const DurableFolder* const> folders, SyncKind kind);

}  // namespace spillover
