#include "tiers/durable_folder.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <exception>
#include <functional>
#include <system_error>
#include <thread>
#include <vector>

#include "base/bytes.hpp"
#include "base/error.hpp"
#include "tiers/work_annotation.hpp"
#include "trace/span.hpp"

namespace spillover {
namespace {

constexpr TraceLabel kFlush{"flush", "disk"};
constexpr mode_t kMode = S_IRUSR | S_IWUSR;
constexpr int kFolderFlags = O_RDONLY | O_DIRECTORY | O_CLOEXEC;

// Repeats what a signal interrupted. Not for syncs: nobody promises that they may be repeated.
template <typename Call>
int repeat(Call call) {
  int result = call();
  while (result < 0 && errno == EINTR) result = call();
  return result;
}

FileDescriptor open_folder(const std::string& path) {
  return FileDescriptor(
      repeat([&] { return file_operations().open(AT_FDCWD, path.c_str(), kFolderFlags, 0); }));
}

[[noreturn]] void fail_with(const std::string& path, const std::string& what, int native_error) {
  throw StorageError(what + ": " + describe_errno(native_error), path, native_error);
}

// The new folder's name is in its parent, which must be told to keep it.
void sync_parent(const std::string& path) {
  const size_t end = path.rfind('/');
  const std::string parent = end == std::string::npos ? "." : path.substr(0, end == 0 ? 1 : end);
  const FileDescriptor directory = open_folder(parent);
  if (!directory.is_open() || file_operations().sync(directory.number(), SyncKind::kAll) != 0) {
    fail_with(parent, "syncing the folder " + parent + " failed", errno);
  }
}

void make_folders(const std::string& path) {
  for (size_t end = path.find('/', 1);; end = path.find('/', end + 1)) {
    const std::string part = path.substr(0, end);
    if (file_operations().make_folder(part.c_str(), 0700) == 0) {
      sync_parent(part);
    } else if (errno != EEXIST && errno != EISDIR && errno != EROFS && errno != EACCES) {
      fail_with(part, "cannot make the folder " + part, errno);
    }
    if (end == std::string::npos) return;
  }
}

}  // namespace

DurableFolder::DurableFolder(const std::string& path, WhenMissing when_missing)
    : path_(path), flushes_(TrackKind::kLanes, "disk flush " + path) {
  if (path.empty()) throw ConfigError("the folder of a durable store must have a name");
  if (when_missing == WhenMissing::kMake) make_folders(path);
  directory_ = open_folder(path);
  if (!directory_.is_open()) fail("cannot open the folder " + path, errno);
}

void DurableFolder::fail(const std::string& what, int native_error) const {
  fail_with(path_, what, native_error);
}

int DurableFolder::open_raw(const char* name, int flags) const {
  return repeat([&] {
    return file_operations().open(directory_.number(), name, flags | O_CLOEXEC | O_NOFOLLOW, kMode);
  });
}

void DurableFolder::lock() {
  const std::string path = path_of(kDurableLockName);
  for (;;) {
    lock_ = UnsharedFile([&] { return open_raw(kDurableLockName, O_RDWR | O_CREAT); });
    if (!lock_.is_open()) fail("cannot open the lock file " + path, errno);
    if (repeat([&] { return file_operations().lock(lock_.number()); }) != 0) {
      const int native_error = errno;
      lock_.reset();
      if (native_error != EWOULDBLOCK) fail("cannot lock " + path, native_error);
      throw StorageError("the durable store in " + path_ + " is in use: somebody has the lock of " +
                             path +
                             ". Another process, or another object of this process, has it open; "
                             "close that first",
                         path, native_error);
    }
    if (is_same(kDurableLockName, lock_.number())) return;
    // It was removed together with a store that was deleted meanwhile.
    file_operations().unlock(lock_.number());
  }
}

void DurableFolder::close() noexcept {
  file_.reset();
  if (lock_.is_open()) file_operations().unlock(lock_.number());
  lock_.reset();
  directory_.reset();
}

void DurableFolder::leave_to_parent() noexcept {
  file_.reset();
  lock_.reset();
  directory_.reset();
}

bool DurableFolder::has(const char* name) const {
  const FileDescriptor found(open_raw(name, O_RDONLY));
  if (!found.is_open() && errno != ENOENT) fail("cannot open " + path_of(name), errno);
  return found.is_open();
}

void DurableFolder::open_blocks(const char* name, int flags) {
  is_direct_ = true;
  file_ = FileDescriptor(open_raw(name, flags | O_RDWR | O_DIRECT));
  if (file_.is_open() || errno != EINVAL) return;
  is_direct_ = false;
  // Where O_CREAT has made the file before O_DIRECT was refused, it is ours: we have the lock.
  file_ = FileDescriptor(open_raw(name, (flags & ~O_EXCL) | O_RDWR));
}

bool DurableFolder::open(const char* name) {
  open_blocks(name, 0);
  if (!file_.is_open() && errno != ENOENT) fail("cannot open " + path_of(name), errno);
  return file_.is_open();
}

bool DurableFolder::make(uint64_t size_bytes) {
  open_blocks(kDurableNewName, O_CREAT | O_EXCL);
  if (!file_.is_open()) fail("cannot make " + path_of(kDurableNewName), errno);
  FileOperations& system = file_operations();
  if (repeat([&] { return system.allocate(file_.number(), 0, size_bytes); }) == 0) return true;
  const int native_error = errno;
  if (means_full(native_error) || native_error == EFBIG) {
    throw DiskFullError("the durable store needs " + format_bytes(size_bytes) + " (" +
                            std::to_string(size_bytes) + " bytes) in " + path_ +
                            ", which has no room for it: " + describe_errno(native_error) +
                            ". Free space there, or give the store another folder as well",
                        path_, native_error);
  }
  if (native_error != EOPNOTSUPP && native_error != ENOSYS && native_error != EINVAL) {
    fail("reserving " + format_bytes(size_bytes) + " in " + path_ + " failed", native_error);
  }
  if (repeat([&] { return system.truncate(file_.number(), size_bytes); }) != 0) {
    fail("making a file of " + format_bytes(size_bytes) + " in " + path_ + " failed", errno);
  }
  return false;
}

void DurableFolder::publish() {
  if (file_operations().rename(directory_.number(), kDurableNewName, kDurableName) != 0) {
    fail("renaming " + path_of(kDurableNewName) + " failed", errno);
  }
  sync_folder();
}

void DurableFolder::retire() {
  if (file_operations().rename(directory_.number(), kDurableName, kDurableNewName) != 0 &&
      errno != ENOENT) {
    fail("renaming " + path_of(kDurableName) + " failed", errno);
  }
  sync_folder();
}

void DurableFolder::remove(const char* name) {
  if (file_operations().unlink(directory_.number(), name) != 0 && errno != ENOENT) {
    fail("removing " + path_of(name) + " failed", errno);
  }
}

void DurableFolder::sync_folder() const {
  if (file_operations().sync(directory_.number(), SyncKind::kAll) != 0) {
    fail("syncing the folder " + path_ + " failed", errno);
  }
}

void DurableFolder::sync(SyncKind kind) const {
  const DurableFolder* const alone = this;
  spillover::sync({&alone, 1}, kind);
}

void DurableFolder::sync_file(SyncKind kind) const {
  const TraceSpan span(kFlush, flushes_);
  if (file_operations().sync(file_.number(), kind) != 0) {
    const int native_error = errno;
    const std::string message = "syncing the durable store in " + path_ +
                                " failed: " + describe_errno(native_error) +
                                ". What was written since the last sync may be lost";
    if (means_full(native_error)) throw DiskFullError(message, path_, native_error);
    throw StorageError(message, path_, native_error);
  }
}

bool DurableFolder::is_in_place() const {
  return is_same(kDurableName, file_.number());
}

bool DurableFolder::is_same(const char* name, int file) const {
  const FileDescriptor found(open_raw(name, O_RDONLY));
  if (!found.is_open() && errno != ENOENT) fail("cannot open " + path_of(name), errno);
  struct stat ours{};
  struct stat theirs{};
  return found.is_open() && fstat(found.number(), &theirs) == 0 && fstat(file, &ours) == 0 &&
         ours.st_dev == theirs.st_dev && ours.st_ino == theirs.st_ino;
}

namespace {

// A flush of one file, which whoever asks for it need not do.
struct Flush {
  const DurableFolder* folder = nullptr;
  // A flush's time is that of the drive's answer: the fixed part of a write.
  WorkId work = annotate_work_submit(kDiskWrite, 0);
  std::exception_ptr error;
};

}  // namespace

void sync(std::span<const DurableFolder* const> folders, SyncKind kind) {
  std::vector<Flush> flushes(folders.size());
  for (size_t i = 0; i < folders.size(); ++i) flushes[i].folder = folders[i];
  const auto perform = [kind](Flush& flush) {
    annotate_work_waits(flush.work);
    try {
      flush.folder->sync_file(kind);
    } catch (...) {
      flush.error = std::current_exception();
    }
    annotate_work_done(flush.work);
  };
  std::vector<std::thread> threads;
  threads.reserve(flushes.size());
  size_t first_own = 1;  // The first is this thread's, as are those that get no thread.
  for (; first_own < flushes.size(); ++first_own) {
    try {
      threads.emplace_back(perform, std::ref(flushes[first_own]));
    } catch (const std::system_error&) {
      break;
    }
  }
  if (!flushes.empty()) perform(flushes.front());
  for (size_t i = first_own; i < flushes.size(); ++i) perform(flushes[i]);
  for (std::thread& thread : threads) thread.join();
  for (const Flush& flush : flushes) annotate_work_wait(flush.work);
  for (const Flush& flush : flushes) {
    if (flush.error) std::rethrow_exception(flush.error);
  }
}

}  // namespace spillover
