// Blocks that are not the pool's: with caching switched off torch wants each tensor to have memory
// from the driver for itself, so that tools such as compute-sanitizer see its bounds.
//
// They count neither in the pool's statistics nor for its limit, as with torch's own allocator. Any
// thread may call these functions, at any time; the blocks are found by their address, so caching
// may be switched on and off while they live.
#pragma once

#include <c10/core/Device.h>
#include <cuda_runtime_api.h>

#include <cstddef>

namespace spillover::torch_adapter {

// Device memory from cudaMalloc. Gives the pool's idle memory back where there is none; then
// throws c10::OutOfMemoryError. Waits like cudaMalloc, without Python's lock.
void* allocate_uncached(c10::DeviceIndex device, size_t size_bytes, cudaStream_t stream);

// Whether the pointer is such a block. O(1); without such blocks it takes no lock.
bool is_uncached(const void* pointer) noexcept;

// Frees such a block, which waits for the device as cudaFree does; false for any other pointer. In
// a forked child, where the block is the parent's, nothing is freed.
bool free_uncached(void* pointer) noexcept;

}  // namespace spillover::torch_adapter
