// Which parts of a scratch file are taken: first fit over a list of holes ordered by offset.
//
// Not thread-safe: its owner, a disk store's folder, holds a lock. All sizes are multiples of the
// disk's block, kDiskBlockBytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>

namespace spillover {

// O_DIRECT wants offsets, lengths and addresses in multiples of the device's logical block: 512 or
// 4096 bytes on every device known to us.
inline constexpr size_t kDiskBlockBytes = 4096;

class ExtentSpace {
 public:
  // Offset of size_bytes that were free; the file's end moves where no hole is large enough.
  uint64_t allocate(uint64_t size_bytes);

  // Gives back what allocate() returned; neighbours are joined, and a hole at the end moves the end
  // back.
  void release(uint64_t offset, uint64_t size_bytes);

  // Past the last extent.
  uint64_t end() const { return end_; }
  uint64_t used_bytes() const { return used_bytes_; }

 private:
  // Invariants: holes do not touch each other nor end_; used + holes = end_.
  std::map<uint64_t, uint64_t> holes_;  // Offset to size.
  uint64_t end_ = 0;
  uint64_t used_bytes_ = 0;
};

}  // namespace spillover
