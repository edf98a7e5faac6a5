// What happens when the pool cannot serve a request: observers, then torch.OutOfMemoryError.
//
// The observers belong to the adapter for as long as the process lives. Any thread may call these
// functions; none holds a lock while it calls an observer, since observers take Python's GIL.
#pragma once

#include <c10/cuda/CUDACachingAllocator.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace spillover::torch_adapter {

// Adds an observer; it is called with (device, size asked for, total, free) before the throw.
void attach_out_of_memory_observer(c10::cuda::CUDACachingAllocator::OutOfMemoryObserver observer);

// Called with (device, size asked for, allocated, limit) before the throw where the pool's limit is
// what refused a request: torch's own allocator tells them of its policy throw_on_cudamalloc_oom.
// The same as c10's OomRejectionObserver, which torch 2.11 has not.
using RejectionObserver = std::function<void(int64_t, size_t, size_t, size_t)>;
void attach_rejection_observer(RejectionObserver observer);

// Calls torch's registered callbacks that may free device memory (for example that of tensors other
// processes have let go). True if one of them freed something.
bool run_free_memory_callbacks();

// Throws c10::OutOfMemoryError. The message begins like PyTorch's own and goes on with what the
// pool knows: the sizes, the largest free block, how fragmented the rest is, the bytes of each tag,
// what was tried, and which setting would help. A reason is given where it was not the pool that
// failed.
[[noreturn]] void throw_out_of_memory(c10::DeviceIndex device, size_t size_bytes,
                                      cudaStream_t stream, const std::string& reason = {});

}  // namespace spillover::torch_adapter
