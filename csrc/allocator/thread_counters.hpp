// What one thread has counted in one pool since the pool last took it over.
//
// Note [Counting without a lock]. A counter that every thread changes would move between processors
// with each allocation. So a thread counts its own changes, and the largest sum of them so far; the
// pool adds them up when somebody asks, and takes them over whenever the thread holds its mutex.
// The peak of a sum is at most the sum of the peaks: with one thread it is exact, with several
// never below the true peak, and above it by at most what their magazines may hold.
//   For each metric: all = small + large; largest >= change, largest >= 0; added >= 0.
//
// Written by the owning thread, under its cache's lock, or its pool's mutex while it takes over;
// read by any thread.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "allocator/block.hpp"

namespace spillover {

struct ThreadCounters {
  enum Metric { kCount, kBytes, kRequestedBytes, kMetricCount };
  static constexpr size_t kClassCount = 3;  // As SPILLOVER_CLASS_*: all, small, large.

  // Plain reads and writes that another thread may look at.
  class Number {
   public:
    int64_t get() const { return value_.load(std::memory_order_relaxed); }
    void set(int64_t value) { value_.store(value, std::memory_order_relaxed); }

   private:
    std::atomic<int64_t> value_{0};
  };

  struct Sum {
    Number change;
    Number largest;  // that `change` has been
    Number added;

    void add(int64_t amount) {
      const int64_t now = change.get() + amount;
      change.set(now);
      if (now > largest.get()) largest.set(now);
      added.set(added.get() + amount);
    }
    void subtract(int64_t amount) { change.set(change.get() - amount); }
  };

  void add(SizeClass size_class, size_t size_bytes, size_t requested_bytes) {
    const size_t own = static_cast<size_t>(size_class) + 1;
    for (const size_t index : {size_t{0}, own}) {
      sums[kCount][index].add(1);
      sums[kBytes][index].add(static_cast<int64_t>(size_bytes));
      sums[kRequestedBytes][index].add(static_cast<int64_t>(requested_bytes));
    }
  }
  void subtract(SizeClass size_class, size_t size_bytes, size_t requested_bytes) {
    const size_t own = static_cast<size_t>(size_class) + 1;
    for (const size_t index : {size_t{0}, own}) {
      sums[kCount][index].subtract(1);
      sums[kBytes][index].subtract(static_cast<int64_t>(size_bytes));
      sums[kRequestedBytes][index].subtract(static_cast<int64_t>(requested_bytes));
    }
  }

  std::array<std::array<Sum, kClassCount>, kMetricCount> sums;
};

}  // namespace spillover
