// The pool's segments and blocks in the form of torch.cuda.memory._snapshot().
//
// Stateless; any thread may call it.
#pragma once

#include <c10/cuda/CUDACachingAllocator.h>

#include <cstdint>
#include <vector>

#include "allocator/c_api.h"

namespace spillover::torch_adapter {

// What the pool holds on the devices 0 to device_count - 1, all of it or that of one private pool.
// The traces are left out: they belong to History.
c10::cuda::CUDACachingAllocator::SnapshotInfo take_snapshot(int device_count,
                                                            c10::MempoolId_t pool);

struct LiveBlock {
  spillover_block_info info;
  cudaStream_t stream;
};
// The live blocks of an arena.
std::vector<LiveBlock> live_blocks(c10::DeviceIndex device, uint32_t arena);

}  // namespace spillover::torch_adapter
