#include "tiers/extent_space.hpp"

#include <algorithm>
#include <iterator>

#include "base/check.hpp"

namespace spillover {
namespace {

void check_size(uint64_t size_bytes) {
  SPILLOVER_CHECK(size_bytes > 0 && size_bytes % kDiskBlockBytes == 0,
                  "extents are whole blocks of the disk");
}

}  // namespace

std::optional<uint64_t> ExtentSpace::take_hole(uint64_t size_bytes) {
  check_size(size_bytes);
  const auto found = by_size_.lower_bound({size_bytes, 0});
  if (found == by_size_.end()) return std::nullopt;
  return take_from(holes_.find(found->second), size_bytes);
}

std::optional<ExtentSpace::Range> ExtentSpace::take_part(uint64_t size_bytes) {
  check_size(size_bytes);
  if (by_size_.empty()) return std::nullopt;
  const auto [hole_bytes, offset] = *by_size_.rbegin();
  const uint64_t taken_bytes = std::min(size_bytes, hole_bytes);
  return Range{take_from(holes_.find(offset), taken_bytes), taken_bytes};
}

uint64_t ExtentSpace::append(uint64_t size_bytes) {
  check_size(size_bytes);
  used_bytes_ += size_bytes;
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
    next = remove_hole(next);
  }
  if (next != holes_.begin()) {
    const auto before = std::prev(next);
    SPILLOVER_CHECK(before->first + before->second <= offset, "an extent was given back twice");
    if (before->first + before->second == offset) {
      offset = before->first;
      size_bytes += before->second;
      remove_hole(before);
    }
  }
  if (offset + size_bytes == end_) {
    end_ = offset;
  } else {
    add_hole(offset, size_bytes);
  }
}

void ExtentSpace::add_hole(uint64_t offset, uint64_t size_bytes) {
  holes_.emplace(offset, size_bytes);
  by_size_.emplace(size_bytes, offset);
}

ExtentSpace::Holes::iterator ExtentSpace::remove_hole(Holes::iterator hole) {
  by_size_.erase({hole->second, hole->first});
  return holes_.erase(hole);
}

uint64_t ExtentSpace::take_from(Holes::iterator hole, uint64_t size_bytes) {
  const auto [offset, hole_bytes] = *hole;
  remove_hole(hole);
  if (hole_bytes > size_bytes) add_hole(offset + size_bytes, hole_bytes - size_bytes);
  used_bytes_ += size_bytes;
  return offset;
}

}  // namespace spillover
