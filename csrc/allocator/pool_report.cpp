// What the pool tells about itself: counters, segments, and the message of an out-of-memory error.
#include <algorithm>
#include <atomic>
#include <iterator>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "allocator/arenas.hpp"
#include "allocator/out_of_memory.hpp"
#include "allocator/pool.hpp"
#include "allocator/statistics.hpp"
#include "driver/device.hpp"
#include "driver/virtual_memory.hpp"

namespace spillover {
namespace {

std::atomic<spillover_segment_observer> g_observer{nullptr};

}  // namespace

spillover_stats_t Pool::statistics() {
  const std::lock_guard lock(mutex_);
  const StillMagazines still(*this);
  return totals();
}

void Pool::reset_accumulated_statistics() {
  const std::lock_guard lock(mutex_);
  const StillMagazines still(*this);
  for (const auto& counters : counters_) take_over(*counters);
  for_each_counters(statistics_, [](const char*, ClassCounters& counters) {
    for (spillover_counter& counter : counters) counter.allocated = counter.freed = 0;
  });
  statistics_.alloc_retries = 0;
  statistics_.ooms = 0;
}

void Pool::reset_peak_statistics() {
  const std::lock_guard lock(mutex_);
  const StillMagazines still(*this);
  for (const auto& counters : counters_) take_over(*counters);
  for_each_counters(statistics_, [](const char*, ClassCounters& counters) {
    for (spillover_counter& counter : counters) counter.peak = counter.current;
  });
  for (auto& [arena, usage] : arenas_) usage.mapped_bytes_peak = usage.mapped_bytes;
  earlier_peak_ = 0;
}

// The counter starts again, and what it had until now is remembered for others.
spillover_interval Pool::take_interval() {
  const std::lock_guard lock(mutex_);
  const StillMagazines still(*this);
  for (const auto& counters : counters_) take_over(*counters);
  spillover_counter& allocated = statistics_.allocated_bytes[SPILLOVER_CLASS_ALL];
  const spillover_interval interval{
      allocated.current, statistics_.reserved_bytes[SPILLOVER_CLASS_ALL].current, allocated.peak};
  earlier_peak_ = std::max(earlier_peak_, allocated.peak);
  allocated.peak = allocated.current;
  return interval;
}

size_t Pool::largest_free_bytes() {
  const std::lock_guard lock(mutex_);
  const StillMagazines still(*this);
  return largest_free();
}

// Chunks without an address count as one block: that is what they are as soon as they are mapped.
size_t Pool::largest_free() const {
  size_t largest_bytes = backing_.cached_bytes();
  for (const auto& [key, stream] : streams_) {
    if (!stream.serves_others()) continue;
    for (const Heap& heap : stream.heaps) {
      if (heap.free.empty()) continue;
      largest_bytes = std::max(largest_bytes, (*heap.free.rbegin())->size_bytes);
    }
  }
  return largest_bytes;
}

void Pool::visit_segments(spillover_segment_visitor visitor, void* user) {
  const std::lock_guard lock(mutex_);
  const StillMagazines still(*this);
  std::vector<spillover_block_info> blocks;
  for (const auto& [address, first] : segments_) {
    blocks.clear();
    const Block* last = first;
    for (const Block* block = first; block != nullptr; block = block->next) {
      blocks.push_back({reinterpret_cast<void*>(block->address), block->size_bytes,
                        block->requested_bytes, static_cast<int>(block->state.load())});
      last = block;
    }
    const StreamState& stream = *first->heap->stream;
    const spillover_segment_info info{reinterpret_cast<void*>(address),
                                      last->end() - address,
                                      stream.key.handle,
                                      first->heap->size_class == SizeClass::kSmall ? 1 : 0,
                                      is_fixed(stream) ? 1 : 0,
                                      stream.arena,
                                      stream.is_asleep ? 1 : 0,
                                      blocks.size()};
    visitor(user, &info, blocks.data());
  }
}

void Pool::observe_segments(spillover_segment_observer observer) noexcept {
  g_observer.store(observer, std::memory_order_release);
}

void Pool::announce(SegmentChange change, const Heap& heap,
                    const AddressRange& range) const noexcept {
  const spillover_segment_observer observer = g_observer.load(std::memory_order_acquire);
  if (observer == nullptr) return;
  const StreamState& stream = *heap.stream;
  const spillover_segment_change told{device_,
                                      change == SegmentChange::kMapped ? 1 : 0,
                                      is_fixed(stream) ? 1 : 0,
                                      reinterpret_cast<void*>(range.begin),
                                      range.size_bytes(),
                                      stream.key.handle,
                                      stream.arena};
  observer(&told);
}

// The same for what may belong to several segments.
void Pool::announce(SegmentChange change, const AddressRange& range) const noexcept {
  if (g_observer.load(std::memory_order_acquire) == nullptr) return;
  for (auto segment = std::prev(segments_.upper_bound(range.begin));
       segment != segments_.end() && segment->first < range.end; ++segment) {
    const Block* last = segment->second;
    while (last->next != nullptr) last = last->next;
    announce(change, *segment->second->heap,
             {std::max(range.begin, segment->first), std::min(range.end, last->end())});
  }
}

// Whether each of the stream's segments is one chunk at an address that others chose.
bool Pool::is_fixed(const StreamState& stream) const {
  return !backing_.is_virtual() || stream.has_upstream;
}

spillover_tag_stats_t Pool::arena_statistics(ArenaId arena) {
  const std::lock_guard lock(mutex_);
  const StillMagazines still(*this);
  spillover_tag_stats_t result{};
  if (const auto usage = arenas_.find(arena); usage != arenas_.end()) {
    result.reserved_bytes =
        static_cast<int64_t>(usage->second.mapped_bytes - usage->second.asleep_bytes);
    result.reserved_bytes_peak = static_cast<int64_t>(usage->second.mapped_bytes_peak);
  }
  count_sleeping(arena, result);
  for (const auto& [address, first] : segments_) {
    if (first->heap->stream->arena != arena) continue;
    for (const Block* block = first; block != nullptr; block = block->next) {
      if (block->state != BlockState::kLive) continue;
      ++result.allocation;
      result.allocated_bytes += static_cast<int64_t>(block->size_bytes);
    }
  }
  return result;
}

// Live bytes of each tag, the largest first; empty where nobody has set one.
std::vector<std::pair<std::string, size_t>> Pool::live_bytes_by_tag() const {
  std::map<ArenaId, size_t> by_arena;
  for (const auto& [address, first] : segments_) {
    const ArenaId arena = first->heap->stream->arena;
    // A graph's or a MemPool's memory has no name of its own.
    size_t& sum_bytes = by_arena[std::min(arena, kFirstPrivateArena)];
    for (const Block* block = first; block != nullptr; block = block->next) {
      if (block->state == BlockState::kLive) sum_bytes += block->size_bytes;
    }
  }
  std::vector<std::pair<std::string, size_t>> tags;
  for (const auto& [arena, size_bytes] : by_arena) {
    if (size_bytes == 0) continue;
    const std::string name = is_private_arena(arena)  ? "private pools"
                             : arena == kDefaultArena ? "untagged"
                                                      : "'" + arena_name(arena) + "'";
    tags.emplace_back(name, size_bytes);
  }
  if (tags.size() == 1 && by_arena[kDefaultArena] != 0) return {};
  std::stable_sort(tags.begin(), tags.end(),
                   [](const auto& a, const auto& b) { return a.second > b.second; });
  return tags;
}

void Pool::throw_out_of_memory(const Request& request, const LadderAttempts& attempts) {
  ++statistics_.ooms;
  const MemoryInfo memory = memory_info(device_);
  const bool may_be_virtual = !backing_.is_virtual() && supports_virtual_memory(device_);
  const StillMagazines still(*this);
  const auto current = [](const ClassCounters& counters) {
    return static_cast<size_t>(counters[SPILLOVER_CLASS_ALL].current);
  };
  const spillover_stats_t statistics = totals();
  OutOfMemoryReport report;
  report.device = device_;
  report.requested_bytes = request.requested_bytes;
  report.free_bytes = memory.free_bytes;
  report.total_bytes = memory.total_bytes;
  report.reserved_bytes = current(statistics.reserved_bytes);
  report.allocated_bytes = current(statistics.allocated_bytes);
  report.waiting_bytes = current(statistics.active_bytes) - report.allocated_bytes;
  report.cached_bytes = report.reserved_bytes - report.allocated_bytes - report.waiting_bytes;
  report.largest_bytes = largest_free();
  for (const auto& [key, stream] : streams_) {
    if (stream.is_private() && stream.arena != request.arena) {
      report.private_bytes += stream.free_bytes();
    }
  }
  report.has_upstream = upstreams_.count(request.arena) != 0;
  report.limit_bytes = limit_by_settings();
  report.is_limit_fraction = report.limit_bytes < settings_.limit_bytes;
  report.is_captured = request.is_captured;
  report.is_virtual = backing_.is_virtual();
  report.may_be_virtual = may_be_virtual;
  report.wait_max = settings_.wait_max;
  report.tags = live_bytes_by_tag();
  report.attempts = attempts;
  throw PoolOutOfMemoryError(std::move(report));
}

}  // namespace spillover
