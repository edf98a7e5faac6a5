// What torch's pluggable allocator has no function for, for the layer above: Python replaces the
// functions of torch that would fail.
//
// Any thread may call any function, without the GIL.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace spillover::plain_adapter {

// Without caching what is idle goes to the driver at once, and then at every free, which waits for
// the device as cudaFree does.
void set_caching(bool keeps_idle);
bool is_caching() noexcept;

// Called before torch.OutOfMemoryError is thrown, without a lock, by a thread that may hold the
// GIL. Observers stay until the process ends.
using OutOfMemoryObserver = std::function<void(int device, size_t requested_bytes,
                                               size_t allowed_bytes, size_t free_bytes)>;
void add_out_of_memory_observer(OutOfMemoryObserver observer);

// Which devices can access the memory of a device: bit i for device i. As soon as the process uses
// both, they may. Called once for each device, before torch uses the allocator on it.
void set_peers(int device, uint64_t peers);

}  // namespace spillover::plain_adapter
