#include "torch_adapter/pool.hpp"

#include <c10/util/Exception.h>

#include "torch_adapter/gil.hpp"

namespace spillover::torch_adapter {

void check_pool(spillover_status status, const char* operation) {
  if (C10_LIKELY(status == SPILLOVER_OK)) return;
  const char* reason = last_pool_error();
  TORCH_CHECK_VALUE(status != SPILLOVER_INVALID_ARGUMENT, "spillover: ", operation, ": ", reason);
  TORCH_CHECK(false, "spillover: ", operation, ": ", reason);
}

spillover_stats_t pool_stats(c10::DeviceIndex device) {
  spillover_stats_t stats{};
  check_pool(without_gil([&] { return spillover_stats(device, &stats); }),
             "reading the statistics");
  return stats;
}

size_t pool_largest_free_bytes(c10::DeviceIndex device) {
  size_t size_bytes = 0;
  check_pool(without_gil([&] { return spillover_largest_free(device, &size_bytes); }),
             "looking for the largest free block");
  return size_bytes;
}

double pool_memory_fraction(c10::DeviceIndex device) {
  double fraction = 1.0;
  check_pool(without_gil([&] { return spillover_memory_fraction(device, &fraction); }),
             "reading the memory fraction");
  return fraction;
}

size_t pool_limit_bytes(c10::DeviceIndex device) {
  size_t size_bytes = 0;
  check_pool(without_gil([&] { return spillover_limit(device, &size_bytes); }),
             "reading the memory limit");
  return size_bytes;
}

}  // namespace spillover::torch_adapter
