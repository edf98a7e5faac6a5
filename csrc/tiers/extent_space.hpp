// Which parts of a scratch file are taken: best fit over its holes.
//
// Not thread-safe: its owner, ExtentPlacement, holds a lock. All sizes are multiples of the disk's
// block, kDiskBlockBytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <utility>

namespace spillover {

// O_DIRECT wants offsets, lengths and addresses in multiples of the device's logical block: 512 or
// 4096 bytes on every device known to us.
inline constexpr size_t kDiskBlockBytes = 4096;

class ExtentSpace {
 public:
  struct Range {
    uint64_t offset;
    uint64_t size_bytes;
  };

  // Offset of size_bytes in a hole; nothing where no hole is large enough.
  std::optional<uint64_t> take_hole(uint64_t size_bytes);

  // Of the largest hole as much as there is, up to size_bytes; nothing where there are no holes.
  std::optional<Range> take_part(uint64_t size_bytes);

  // Offset of size_bytes at the file's end, which moves.
  uint64_t append(uint64_t size_bytes);

  // Gives back what was taken, or a part of it; neighbours are joined, and a hole at the end moves
  // the end back.
  void release(uint64_t offset, uint64_t size_bytes);

  // Past the last extent.
  uint64_t end() const { return end_; }
  uint64_t used_bytes() const { return used_bytes_; }
  uint64_t largest_hole() const { return by_size_.empty() ? 0 : by_size_.rbegin()->first; }

 private:
  using Holes = std::map<uint64_t, uint64_t>;

  void add_hole(uint64_t offset, uint64_t size_bytes);
  Holes::iterator remove_hole(Holes::iterator hole);
  uint64_t take_from(Holes::iterator hole, uint64_t size_bytes);

  // Invariants: holes do not touch each other nor end_; used + holes = end_; both hold the same.
  Holes holes_;                                      // Offset to size.
  std::set<std::pair<uint64_t, uint64_t>> by_size_;  // Size and offset.
  uint64_t end_ = 0;
  uint64_t used_bytes_ = 0;
};

}  // namespace spillover
