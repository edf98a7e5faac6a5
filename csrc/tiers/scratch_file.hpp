// A file without a name in a folder of the disk tier: it is gone when the process is, however that
// ends. Where it had a name for a moment, see Note [Abandoned scratch] in named_scratch.hpp.
//
// Move-only. What blocks() gives may be used by any threads at once, the rest by one at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "tiers/block_file.hpp"

namespace spillover {

enum class Preallocation {
  kReserve,  // Take the space before writing: a full disk shows early, and extents lie together.
  kNone,     // For file systems that copy on write, where reserved space is not used anyway.
};

class ScratchFile {
 public:
  // Makes the folder (mode 0700) where it is missing, and removes what killed processes have left
  // there. The file has mode 0600. Throws StorageError.
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

  // What transfers of its blocks go through; good while this file is.
  BlockFile blocks() const { return {descriptor_, folder_, "scratch file"}; }

 private:
  std::string folder_;
  int descriptor_ = -1;  // -1 when moved from.
  bool is_direct_ = true;
  bool is_preallocated_ = true;  // Cleared where the file system cannot.
  uint64_t reserved_end_ = 0;
};

}  // namespace spillover
