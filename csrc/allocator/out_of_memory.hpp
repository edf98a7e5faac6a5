// What the pool knows when it cannot serve a request, and the sentences that say it.
//
// Values, filled in by Pool::throw_out_of_memory(); the functions are thread-safe.
#pragma once

#include <chrono>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include "allocator/settings.hpp"
#include "base/error.hpp"

namespace spillover {

// What was tried before a request failed, and the bytes that each step made usable for it: the
// rungs of pool_ladder.cpp. Steps that were taken again after a reclaimer add up.
struct LadderAttempts {
  size_t kept_bytes = 0;  // by threads
  std::chrono::milliseconds waited{0};
  size_t waited_bytes = 0;
  bool has_timed_out = false;
  bool has_waited_for_device = false;
  size_t device_bytes = 0;
  bool has_returned_idle = false;
  size_t returned_bytes = 0;  // to the driver, to be asked for anew
  size_t reclaimer_count = 0;
  size_t reclaimed_bytes = 0;
};

struct OutOfMemoryReport {
  int device = 0;
  size_t requested_bytes = 0;
  // Of the device, as the driver says.
  size_t free_bytes = 0;
  size_t total_bytes = 0;
  // Of the pool: reserved = allocated + waiting + cached.
  size_t reserved_bytes = 0;
  size_t allocated_bytes = 0;
  size_t waiting_bytes = 0;
  size_t cached_bytes = 0;
  size_t largest_bytes = 0;  // free block
  size_t private_bytes = 0;  // free in private arenas, which serve their owners only
  size_t limit_bytes = Settings::kNoLimit;
  bool is_limit_fraction = false;  // It comes from the setting 'fraction', not 'limit'.
  bool is_captured = false;
  bool is_virtual = true;       // The pool maps memory.
  bool may_be_virtual = false;  // The device has virtual memory, and settings keep it off.
  std::chrono::milliseconds wait_max{0};
  std::vector<std::pair<std::string, size_t>> tags;  // Live bytes of each, the largest first.
  LadderAttempts attempts;

  // The share of the cached memory that even the largest request to succeed could not use, 0 to 1.
  double fragmentation() const;
  // Whether the limit stood in the way of taking the request's bytes from the driver.
  bool is_limited() const;
  // What is held beside this pool: by other processes, contexts and libraries.
  size_t others_bytes() const;
};

// The figures in one or two sentences.
std::string describe_figures(const OutOfMemoryReport& report);
// What goes with any figures: what has which tag, what was tried, and what would help.
std::string describe_details(const OutOfMemoryReport& report);

// All of it as torch.OutOfMemoryError says it: programs look for the words that it begins with.
std::string describe_for_torch(const OutOfMemoryReport& report);

class PoolOutOfMemoryError : public DeviceOutOfMemoryError {
 public:
  explicit PoolOutOfMemoryError(OutOfMemoryReport report)
      : DeviceOutOfMemoryError(describe_figures(report) + " " + describe_details(report),
                               report.requested_bytes),
        report_(std::move(report)) {}
  const OutOfMemoryReport& report() const { return report_; }

 private:
  OutOfMemoryReport report_;
};

}  // namespace spillover
