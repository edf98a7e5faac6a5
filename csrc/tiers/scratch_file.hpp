// A file without a name in a folder of the disk tier: it is gone when the process is, however that
// ends.
//
// Move-only. transfer() may be called from any thread at once, the rest by one thread at a time.
// Offsets, sizes and addresses are multiples of kDiskBlockBytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "tiers/transfer_progress.hpp"

namespace spillover {

enum class Preallocation {
  kReserve,  // Take the space before writing: a full disk shows early, and extents lie together.
  kNone,     // For file systems that copy on write, where reserved space is not used anyway.
};

class ScratchFile {
 public:
  // Makes the folder (mode 0700) where it is missing. The file has mode 0600. Throws StorageError.
  ScratchFile(const std::string& folder, Preallocation preallocation);
  ~ScratchFile();
  ScratchFile(ScratchFile&& other) noexcept;
  ScratchFile& operator=(ScratchFile&& other) noexcept;
  ScratchFile(const ScratchFile&) = delete;
  ScratchFile& operator=(const ScratchFile&) = delete;

  const std::string& folder() const { return folder_; }
  int descriptor() const { return descriptor_; }
  // False where the file system refuses O_DIRECT, as some kernels' tmpfs does: the page cache then
  // holds a second copy of what is written.
  bool is_direct() const { return is_direct_; }

  // Makes sure that the file system has room up to end, and ahead of need up to end_max, which is
  // no less. Throws DiskFullError or StorageError.
  void reserve(uint64_t end, uint64_t end_max);
  // Up to where the file may have space on the disk.
  uint64_t reserved_end() const { return reserved_end_; }
  // Cuts off what is behind end.
  void give_back(uint64_t end) noexcept;

  // Blocks until all bytes are moved: short transfers are taken up again, and interrupted ones
  // repeated, which is counted in resubmits. Throws DiskFullError or StorageError with folder,
  // offset and errno. data is only read from in a write.
  void transfer(TransferDirection direction, std::byte* data, size_t size_bytes, uint64_t offset,
                uint32_t& resubmits) const;

  // For whoever makes transfers of this file another way: throws what transfer() would, of one that
  // began at offset and failed.
  [[noreturn]] void throw_failure(const TransferProgress& progress, uint64_t offset) const;

 private:
  [[noreturn]] void throw_error(const char* operation, uint64_t offset, size_t size_bytes,
                                int native_error) const;

  std::string folder_;
  int descriptor_ = -1;  // -1 when moved from.
  bool is_direct_ = true;
  bool is_preallocated_ = true;  // Cleared where the file system cannot.
  uint64_t reserved_end_ = 0;
};

}  // namespace spillover
