// The pool's counters in torch's form. Stateless; any thread may call it.
#pragma once

#include <c10/core/CachingDeviceAllocator.h>

#include "allocator/c_api.h"

namespace spillover::torch_adapter {

// What torch.cuda.memory_stats() is made of. Every size class of the pool has its counterpart; what
// the pool does not have (oversize blocks, private pools) stays 0.
c10::CachingDeviceAllocator::DeviceStats to_device_stats(const spillover_stats_t& stats);

}  // namespace spillover::torch_adapter
