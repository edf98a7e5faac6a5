// The beginning and end of memory: allocating when the budget is tight, and freeing memory that
// streams may still use. What synchronises and what does not is CUDA's: cuMemFree and cuMemFreeHost
// wait, cuMemFreeAsync takes its turn on a stream, cuMemUnmap does neither, so that unfinished work
// on the range is a hazard.
//
// Called with Machine::mutex held; the functions let go of it while they wait.
#pragma once

#include <cuda.h>

#include <cstddef>

#include "emulator/core/machine.hpp"
#include "emulator/core/types.hpp"

namespace spillover::emulator {

// pool is nullptr for memory that is not stream-ordered.
CUresult allocate_device_memory(Machine& machine, Lock& lock, int device, std::size_t size_bytes,
                                Pool* pool, Address* address);

// Also frees managed memory.
CUresult free_device_memory(Machine& machine, Lock& lock, Address address);

CUresult free_device_memory_async(Machine& machine, Lock& lock, const StreamRef& stream,
                                  Address address);

// The last cuIpcCloseMemHandle of memory of another process.
CUresult release_imported_memory(Machine& machine, Lock& lock, Address address);

// Takes back what a device's primary context gave: its memory, but not that of pools and mappings,
// which belong to no context; its settings; its error. Streams and events live on.
void reset_primary_context(Machine& machine, Lock& lock, int device);

CUresult unmap_memory(Machine& machine, Lock& lock, Address address, std::size_t size_bytes);

// kind says which of cuMemFreeHost and cuMemHostUnregister was called.
CUresult remove_host_region(Machine& machine, Lock& lock, Address address, HostRegionKind kind);

}  // namespace spillover::emulator
