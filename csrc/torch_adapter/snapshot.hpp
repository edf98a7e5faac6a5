// The pool's segments and blocks in the form of torch.cuda.memory._snapshot().
//
// Stateless; any thread may call it.
#pragma once

#include <c10/cuda/CUDACachingAllocator.h>

namespace spillover::torch_adapter {

// Everything the pool holds on the devices 0 to device_count - 1. The traces are left out: they
// belong to History.
c10::cuda::CUDACachingAllocator::SnapshotInfo take_snapshot(int device_count);

}  // namespace spillover::torch_adapter
