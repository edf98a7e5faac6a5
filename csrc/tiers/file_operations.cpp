#include "tiers/file_operations.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>

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

int FileOperations::allocate(int file, uint64_t offset, uint64_t size_bytes) {
  // Not posix_fallocate: where the file system cannot, that one writes zeros instead.
  return fallocate(file, 0, static_cast<off_t>(offset), static_cast<off_t>(size_bytes));
}

ssize_t FileOperations::read(int file, std::byte* data, size_t size_bytes, uint64_t offset) {
  return pread(file, data, size_bytes, static_cast<off_t>(offset));
}

ssize_t FileOperations::write(int file, const std::byte* data, size_t size_bytes, uint64_t offset) {
  return pwrite(file, data, size_bytes, static_cast<off_t>(offset));
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
