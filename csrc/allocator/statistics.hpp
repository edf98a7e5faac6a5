// Counting, with the meaning of the counters of torch's DeviceStats.
//
// Values; the pool's mutex guards its own. Each change goes to the class and to the sum of classes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "allocator/block.hpp"
#include "allocator/c_api.h"

namespace spillover {

using ClassCounters = spillover_counter[SPILLOVER_CLASS_COUNT];

constexpr int class_index(SizeClass size_class) {
  return size_class == SizeClass::kSmall ? SPILLOVER_CLASS_SMALL : SPILLOVER_CLASS_LARGE;
}

inline void add(ClassCounters& counters, SizeClass size_class, size_t amount) {
  for (const int index : {static_cast<int>(SPILLOVER_CLASS_ALL), class_index(size_class)}) {
    spillover_counter& counter = counters[index];
    counter.current += static_cast<int64_t>(amount);
    counter.allocated += static_cast<int64_t>(amount);
    counter.peak = std::max(counter.peak, counter.current);
  }
}

inline void subtract(ClassCounters& counters, SizeClass size_class, size_t amount) {
  for (const int index : {static_cast<int>(SPILLOVER_CLASS_ALL), class_index(size_class)}) {
    counters[index].current -= static_cast<int64_t>(amount);
    counters[index].freed += static_cast<int64_t>(amount);
  }
}

// Applies action to each array of counters, with the name that torch.cuda.memory_stats gives it.
template <class Statistics, class Action>
void for_each_counters(Statistics& statistics, Action action) {
  action("allocation", statistics.allocation);
  action("segment", statistics.segment);
  action("active", statistics.active);
  action("inactive_split", statistics.inactive_split);
  action("allocated_bytes", statistics.allocated_bytes);
  action("reserved_bytes", statistics.reserved_bytes);
  action("active_bytes", statistics.active_bytes);
  action("inactive_split_bytes", statistics.inactive_split_bytes);
  action("requested_bytes", statistics.requested_bytes);
}

}  // namespace spillover
