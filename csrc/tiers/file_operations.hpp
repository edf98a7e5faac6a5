// The operations on files that the disk tier makes, so that tests can put errors in their place:
// the tier's one way to the file system.
//
// Each does what the system call of the same meaning does, and reports the same way: a result below
// zero with errno set; transfers report an errno below zero instead, as io_uring does. Thread-safe.
// The object in use is looked up once an operation; replacing it while operations run is allowed,
// so a replacement must live as long as the process.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "tiers/transfer_progress.hpp"

namespace spillover {

// What becomes of one transfer, where a test has a say in it. Whoever makes the transfer waits
// delay_us first, then fails with native_error or hands data and size_bytes to the system, and
// passes on what finish() makes of the result. Not thread-safe.
class TransferPlan {
 public:
  TransferPlan(std::byte* planned_data, size_t planned_bytes)
      : data(planned_data), size_bytes(planned_bytes) {}
  TransferPlan(const TransferPlan&) = delete;
  TransferPlan& operator=(const TransferPlan&) = delete;
  virtual ~TransferPlan() = default;

  // result is the system's: bytes, or an errno below zero. Not called where native_error is set.
  virtual ssize_t finish(ssize_t result) noexcept = 0;

  uint64_t delay_us = 0;
  int native_error = 0;  // 0 for none.
  std::byte* data;       // Alive as long as the plan.
  size_t size_bytes;
};

// What a flush makes durable of a file.
enum class SyncKind {
  kData,  // Its contents, and of what is kept about it as much as reading them needs: its size.
  kAll,   // Everything about it; of a folder, which names are in it.
};

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
  // Appends the names in the folder.
  virtual int list(int folder, std::vector<std::string>& names);
  // Replaces a file that has the new name.
  virtual int rename(int folder, const char* name, const char* new_name);
  // Takes the file's lock for this process alone, or fails with EWOULDBLOCK; of this process, too,
  // a second opening of the file is refused. unlock() gives it back whoever has inherited the file.
  virtual int lock(int file);
  virtual int unlock(int file);
  // Takes space for [offset, offset + size_bytes) of the file.
  virtual int allocate(int file, uint64_t offset, uint64_t size_bytes);
  // Gives back the space behind.
  virtual int truncate(int file, uint64_t size_bytes);
  // Returns when what was done to the file before will outlast a loss of power.
  virtual int sync(int file, SyncKind kind);

  // Asked once for each attempt of a transfer, whichever way it is made. Null: it goes ahead as it
  // is. data is only read from in a write.
  virtual std::unique_ptr<TransferPlan> plan(int file, TransferDirection direction, std::byte* data,
                                             size_t size_bytes, uint64_t offset);

  // One attempt by the calling thread, as planned. Bytes moved, or an errno below zero.
  ssize_t transfer(int file, TransferDirection direction, std::byte* data, size_t size_bytes,
                   uint64_t offset);
};

// What the disk tier uses now: the system, unless replaced.
FileOperations& file_operations();

// nullptr puts the system back.
void replace_file_operations(FileOperations* replacement);

}  // namespace spillover
