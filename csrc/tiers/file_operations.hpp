// The operations on files that the disk tier makes, so that tests can put errors in their place:
// the tier's one way to the file system.
//
// Each does what the system call of the same meaning does, and reports the same way: a result below
// zero with errno set. Thread-safe. The object in use is looked up once an operation; replacing it
// while operations run is allowed, so a replacement must live as long as the process.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>

namespace spillover {

// The base class is the system itself.
class FileOperations {
 public:
  FileOperations() = default;
  FileOperations(const FileOperations&) = delete;
  FileOperations& operator=(const FileOperations&) = delete;
  virtual ~FileOperations() = default;

  virtual int make_folder(const char* path, mode_t mode);
  virtual int open(int folder, const char* name, int flags, mode_t mode);
  virtual int unlink(int folder, const char* name);
  // Takes space for [offset, offset + size_bytes) of the file.
  virtual int allocate(int file, uint64_t offset, uint64_t size_bytes);
  virtual ssize_t read(int file, std::byte* data, size_t size_bytes, uint64_t offset);
  virtual ssize_t write(int file, const std::byte* data, size_t size_bytes, uint64_t offset);
};

// What the disk tier uses now: the system, unless replaced.
FileOperations& file_operations();

// nullptr puts the system back.
void replace_file_operations(FileOperations* replacement);

}  // namespace spillover
