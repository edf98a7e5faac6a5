// Counting, with the meaning of the counters of torch's DeviceStats.
//
// Values; the pool's mutex guards its own. Each change goes to the class and to the sum of classes.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

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

// Moves the counters of both classes to new values. What falls goes first: memory that changes its
// class is no peak.
inline void set_current(ClassCounters& counters, size_t small, size_t large) {
  const std::array<std::pair<SizeClass, size_t>, 2> values{
      {{SizeClass::kSmall, small}, {SizeClass::kLarge, large}}};
  for (const auto& [size_class, value] : values) {
    const auto current = static_cast<size_t>(counters[class_index(size_class)].current);
    if (value < current) subtract(counters, size_class, current - value);
  }
  for (const auto& [size_class, value] : values) {
    const auto current = static_cast<size_t>(counters[class_index(size_class)].current);
    if (value > current) add(counters, size_class, value - current);
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
