// Where the memory of a private pool comes from: spillover's pool, or an allocator of its own, such
// as torch.cuda.memory.CUDAPluggableAllocator makes of a library's two functions.
//
// Such an allocator is asked for segments, as torch's own allocator does, on the stream that they
// are for, and gets them back when the pool is gone and the cache is emptied. It lives until then.
// Its functions are called once at a time on each device, without the GIL.
//
// Any thread may call these functions.
#pragma once

#include <c10/cuda/CUDACachingAllocator.h>

#include <cstdint>
#include <memory>

namespace spillover::torch_adapter {

using PoolAllocator = std::shared_ptr<c10::cuda::CUDACachingAllocator::CUDAAllocator>;

// Each gives the number of a private arena; throws c10::Error.
uint32_t make_private_arena(c10::DeviceIndex device);
uint32_t make_private_arena_from(c10::DeviceIndex device, PoolAllocator allocator);

// What a pool's allocator has thrown, other than that it has no memory, while it served this
// thread's request: forgets it before one, and throws it, if there is any, after one that failed.
void forget_source_failure() noexcept;
void rethrow_source_failure();

}  // namespace spillover::torch_adapter
