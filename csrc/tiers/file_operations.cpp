#include "tiers/file_operations.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <thread>

namespace spillover {
namespace {

std::atomic<FileOperations*> replaced{nullptr};

}  // namespace

int FileOperations::make_folder(const char* path, mode_t mode) {
  return mkdir(path, mode);
}

int FileOperations::open(int folder, const char* name, int flags, mode_t mode) {
  return openat(folder, name, flags, mode);
}

int FileOperations::unlink(int folder, const char* name) {
  return unlinkat(folder, name, 0);
}

int FileOperations::list(int folder, std::vector<std::string>& names) {
  const int again = openat(folder, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (again < 0) return -1;
  const std::unique_ptr<DIR, int (*)(DIR*)> stream(fdopendir(again), &closedir);
  if (stream == nullptr) {
    close(again);
    return -1;
  }
  for (;;) {
    errno = 0;
    const dirent* const entry = readdir(stream.get());
    if (entry == nullptr) return errno == 0 ? 0 : -1;
    names.emplace_back(entry->d_name);
  }
}

int FileOperations::rename(int folder, const char* name, const char* new_name) {
  return renameat(folder, name, folder, new_name);
}

int FileOperations::lock(int file) {
  return flock(file, LOCK_EX | LOCK_NB);
}

int FileOperations::unlock(int file) {
  return flock(file, LOCK_UN);
}

int FileOperations::allocate(int file, uint64_t offset, uint64_t size_bytes) {
  // Not posix_fallocate: where the file system cannot, that one writes zeros instead.
  return fallocate(file, 0, static_cast<off_t>(offset), static_cast<off_t>(size_bytes));
}

int FileOperations::truncate(int file, uint64_t size_bytes) {
  return ftruncate(file, static_cast<off_t>(size_bytes));
}

int FileOperations::sync(int file, SyncKind kind) {
  return kind == SyncKind::kData ? fdatasync(file) : fsync(file);
}

std::unique_ptr<TransferPlan> FileOperations::plan(int /*file*/, TransferDirection /*direction*/,
                                                   std::byte* /*data*/, size_t /*size_bytes*/,
                                                   uint64_t /*offset*/) {
  return nullptr;
}

ssize_t FileOperations::transfer(int file, TransferDirection direction, std::byte* data,
                                 size_t size_bytes, uint64_t offset) {
  const std::unique_ptr<TransferPlan> planned = plan(file, direction, data, size_bytes, offset);
  if (planned != nullptr) {
    std::this_thread::sleep_for(std::chrono::microseconds(planned->delay_us));
    if (planned->native_error != 0) return -planned->native_error;
    data = planned->data;
    size_bytes = planned->size_bytes;
  }
  const auto position = static_cast<off_t>(offset);
  ssize_t result = direction == TransferDirection::kWrite ? pwrite(file, data, size_bytes, position)
                                                          : pread(file, data, size_bytes, position);
  if (result < 0) result = -errno;
  return planned != nullptr ? planned->finish(result) : result;
}

FileOperations& file_operations() {
  // Leaked on purpose: I/O threads may outlive static destructors.
  static auto& system = *new FileOperations;
  FileOperations* const replacement = replaced.load(std::memory_order_acquire);
  return replacement == nullptr ? system : *replacement;
}

void replace_file_operations(FileOperations* replacement) {
  replaced.store(replacement, std::memory_order_release);
}

}  // namespace spillover
