#include "tiers/extent_space.hpp"

#include <iterator>

#include "base/check.hpp"

namespace spillover {

uint64_t ExtentSpace::allocate(uint64_t size_bytes) {
  SPILLOVER_CHECK(size_bytes > 0 && size_bytes % kDiskBlockBytes == 0,
                  "extents are whole blocks of the disk");
  used_bytes_ += size_bytes;
  for (auto hole = holes_.begin(); hole != holes_.end(); ++hole) {
    if (hole->second < size_bytes) continue;
    const uint64_t offset = hole->first;
    const uint64_t rest = hole->second - size_bytes;
    holes_.erase(hole);
    if (rest > 0) holes_.emplace(offset + size_bytes, rest);
    return offset;
  }
  const uint64_t offset = end_;
  end_ += size_bytes;
  return offset;
}

void ExtentSpace::release(uint64_t offset, uint64_t size_bytes) {
  SPILLOVER_CHECK(size_bytes > 0 && offset + size_bytes <= end_ && size_bytes <= used_bytes_,
                  "an extent came back that was never given");
  used_bytes_ -= size_bytes;
  auto next = holes_.lower_bound(offset);
  SPILLOVER_CHECK(next == holes_.end() || offset + size_bytes <= next->first,
                  "an extent was given back twice");
  if (next != holes_.end() && next->first == offset + size_bytes) {
    size_bytes += next->second;
    next = holes_.erase(next);
  }
  if (next != holes_.begin()) {
    const auto before = std::prev(next);
    SPILLOVER_CHECK(before->first + before->second <= offset, "an extent was given back twice");
    if (before->first + before->second == offset) {
      offset = before->first;
      size_bytes += before->second;
      holes_.erase(before);
    }
  }
  if (offset + size_bytes == end_) {
    end_ = offset;
  } else {
    holes_.emplace(offset, size_bytes);
  }
}

}  // namespace spillover
