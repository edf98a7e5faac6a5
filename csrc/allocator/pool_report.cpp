// What the pool tells about itself: counters, segments, and the message of an out-of-memory error.
#include <algorithm>
#include <array>
#include <cstdio>

#include "allocator/pool.hpp"
#include "allocator/statistics.hpp"
#include "base/error.hpp"
#include "driver/device.hpp"

namespace spillover {

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
}

size_t Pool::largest_free_bytes() {
  const std::lock_guard lock(mutex_);
  const StillMagazines still(*this);
  return largest_free();
}

size_t Pool::largest_free() const {
  size_t largest_bytes = 0;
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
                                      stream.arena,
                                      stream.is_asleep ? 1 : 0,
                                      blocks.size()};
    visitor(user, &info, blocks.data());
  }
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

void Pool::throw_out_of_memory(const Request& request, size_t reclaimed_bytes) {
  ++statistics_.ooms;
  const MemoryInfo memory = memory_info(device_);
  const auto current = [](const ClassCounters& counters) {
    return static_cast<size_t>(counters[SPILLOVER_CLASS_ALL].current);
  };
  const spillover_stats_t statistics = totals();
  const size_t reserved_bytes = current(statistics.reserved_bytes);
  const size_t allocated_bytes = current(statistics.allocated_bytes);
  const size_t waiting_bytes = current(statistics.active_bytes) - allocated_bytes;
  const size_t cached_bytes = reserved_bytes - allocated_bytes - waiting_bytes;
  const size_t largest_bytes = largest_free();
  // The share of the cached memory that even the largest request to succeed could not use.
  const double fragmentation_percent =
      cached_bytes == 0 ? 0.0
                        : 100.0 * static_cast<double>(cached_bytes - largest_bytes) /
                              static_cast<double>(cached_bytes);
  std::array<char, 16> percent{};
  std::snprintf(percent.data(), percent.size(), "%.1f %%", fragmentation_percent);

  std::string message = "device " + std::to_string(device_) +
                        " is out of memory: " + format_bytes(request.requested_bytes) +
                        " requested; the device has " + format_bytes(memory.free_bytes) +
                        " free of " + format_bytes(memory.total_bytes) + "; this pool holds " +
                        format_bytes(reserved_bytes) + ": " + format_bytes(allocated_bytes) +
                        " allocated, " + format_bytes(waiting_bytes) + " waiting for streams, " +
                        format_bytes(cached_bytes) + " cached. The largest free block has " +
                        format_bytes(largest_bytes) + "; fragmentation is " + percent.data() + ".";
  if (reclaimed_bytes != 0) {
    message += " Reclaimers say that they freed " + format_bytes(reclaimed_bytes) + ".";
  }
  const size_t limit = limit_by_settings();
  if (limit < memory.total_bytes) {
    const bool is_fraction = limit < settings_.limit_bytes;
    message += std::string(is_fraction ? " The memory fraction" : " The setting 'limit'") +
               " allows the pool " + format_bytes(limit) + "; raise it with " +
               (is_fraction ? "torch.cuda.set_per_process_memory_fraction or " : "") +
               "spillover.allocator.configure(" + (is_fraction ? "fraction" : "limit") + "=...).";
  }
  message +=
      " Use a smaller batch, or move data off the device: spillover.offload_activations, "
      "spillover.stream_parameters, spillover.optim.";
  throw DeviceOutOfMemoryError(message, request.requested_bytes);
}

}  // namespace spillover
