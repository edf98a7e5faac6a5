#include "torch_adapter/segment_log.hpp"

#include <algorithm>
#include <utility>

#include "torch_adapter/gil.hpp"
#include "torch_adapter/pool.hpp"

namespace spillover::torch_adapter {
namespace {

using Range = SegmentLog::Range;

void collect_range(void* user, const spillover_segment_info* segment,
                   const spillover_block_info* /*blocks*/) {
  const auto begin = reinterpret_cast<uintptr_t>(segment->address);
  static_cast<std::vector<Range>*>(user)->push_back({begin, begin + segment->size_bytes,
                                                     static_cast<cudaStream_t>(segment->stream),
                                                     segment->tag});
}

// The parts of ranges that no range of others covers. Both are sorted and disjoint.
std::vector<Range> ranges_without(const std::vector<Range>& ranges,
                                  const std::vector<Range>& others) {
  std::vector<Range> rest;
  auto other = others.begin();
  for (Range range : ranges) {
    while (other != others.end() && other->end <= range.begin) ++other;
    for (auto next = other; next != others.end() && next->begin < range.end; ++next) {
      if (range.begin < next->begin)
        rest.push_back({range.begin, next->begin, range.stream, range.arena});
      range.begin = std::max(range.begin, next->end);
    }
    if (range.begin < range.end) rest.push_back(range);
  }
  return rest;
}

}  // namespace

SegmentLog::Totals SegmentLog::totals(c10::DeviceIndex device) {
  const spillover_stats_t stats = pool_stats(device);
  const auto& bytes = stats.reserved_bytes[SPILLOVER_CLASS_ALL];
  const auto& segments = stats.segment[SPILLOVER_CLASS_ALL];
  return {bytes.allocated, bytes.freed, segments.allocated, segments.freed};
}

SegmentLog::Seen SegmentLog::look(c10::DeviceIndex device) {
  Seen seen;
  seen.totals = totals(device);
  check_pool(spillover_visit_segments(device, &collect_range, &seen.ranges),
             "listing the segments");
  std::sort(seen.ranges.begin(), seen.ranges.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  return seen;
}

void SegmentLog::start(int device_count) {
  const GilRelease no_gil;
  const std::lock_guard lock(mutex_);
  seen_.clear();
  for (int device = 0; device < device_count; ++device) {
    seen_.push_back(look(static_cast<c10::DeviceIndex>(device)));
  }
}

SegmentLog::Changes SegmentLog::changes(c10::DeviceIndex device) {
  const GilRelease no_gil;
  const std::lock_guard lock(mutex_);
  const auto index = static_cast<size_t>(static_cast<unsigned char>(device));
  if (index >= seen_.size()) return {};
  Seen& seen = seen_[index];
  if (totals(device) == seen.totals) return {};
  Seen now = look(device);
  Changes changes{ranges_without(seen.ranges, now.ranges), ranges_without(now.ranges, seen.ranges)};
  seen = std::move(now);
  return changes;
}

}  // namespace spillover::torch_adapter
