#include "torch_adapter/device_stats.hpp"

namespace spillover::torch_adapter {
namespace {

using c10::CachingAllocator::Stat;
using c10::CachingAllocator::StatArray;
using c10::CachingAllocator::StatType;

Stat to_stat(const spillover_counter& counter) {
  Stat stat;
  stat.current = counter.current;
  stat.peak = counter.peak;
  stat.allocated = counter.allocated;
  stat.freed = counter.freed;
  return stat;
}

StatArray to_stat_array(const spillover_counter (&counters)[SPILLOVER_CLASS_COUNT]) {
  StatArray array;
  array[static_cast<size_t>(StatType::AGGREGATE)] = to_stat(counters[SPILLOVER_CLASS_ALL]);
  array[static_cast<size_t>(StatType::SMALL_POOL)] = to_stat(counters[SPILLOVER_CLASS_SMALL]);
  array[static_cast<size_t>(StatType::LARGE_POOL)] = to_stat(counters[SPILLOVER_CLASS_LARGE]);
  return array;
}

}  // namespace

c10::CachingDeviceAllocator::DeviceStats to_device_stats(const spillover_stats_t& stats) {
  c10::CachingDeviceAllocator::DeviceStats result;
  result.allocation = to_stat_array(stats.allocation);
  result.segment = to_stat_array(stats.segment);
  result.active = to_stat_array(stats.active);
  result.inactive_split = to_stat_array(stats.inactive_split);
  result.allocated_bytes = to_stat_array(stats.allocated_bytes);
  result.reserved_bytes = to_stat_array(stats.reserved_bytes);
  result.active_bytes = to_stat_array(stats.active_bytes);
  result.inactive_split_bytes = to_stat_array(stats.inactive_split_bytes);
  result.requested_bytes = to_stat_array(stats.requested_bytes);
  result.num_alloc_retries = stats.alloc_retries;
  result.num_ooms = stats.ooms;
  // A segment is one piece of memory from the driver.
  result.num_device_alloc = stats.segment[SPILLOVER_CLASS_ALL].allocated;
  result.num_device_free = stats.segment[SPILLOVER_CLASS_ALL].freed;
  // Blocks of every size may be split; torch says that with -1.
  result.max_split_size = -1;
  return result;
}

}  // namespace spillover::torch_adapter
