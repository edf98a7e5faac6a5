// The pool's C interface as the adapter calls it: a status other than OK becomes torch's exception.
//
// Stateless; any thread may call it.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/DeviceType.h>

#include "allocator/c_api.h"

namespace spillover::torch_adapter {

// The reason of the pool's last failure on this thread, as a complete sentence.
inline const char* last_pool_error() noexcept {
  return spillover_last_error();
}

// Throws c10::Error with what was being done and the pool's reason where status is not OK. Running
// out of memory is reported by throw_out_of_memory() instead, which has more to tell.
void check_pool(spillover_status status, const char* operation);

// Counters of a device; throws c10::Error on failure.
spillover_stats_t pool_stats(c10::DeviceIndex device);

// Size of the largest free block of a device, bytes; throws c10::Error on failure.
size_t pool_largest_free_bytes(c10::DeviceIndex device);

// Share of the device's memory that the pool may hold, 0 to 1; throws c10::Error on failure.
double pool_memory_fraction(c10::DeviceIndex device);

// What the pool may hold by its settings, SIZE_MAX without a limit; throws c10::Error on failure.
size_t pool_limit_bytes(c10::DeviceIndex device);

inline c10::Device cuda_device(c10::DeviceIndex index) {
  return {c10::DeviceType::CUDA, index};
}

}  // namespace spillover::torch_adapter
