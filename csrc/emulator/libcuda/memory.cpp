// Allocation of device, pinned and managed memory.
#include <sys/mman.h>

#include <cstdint>

#include "emulator/core/lifetimes.hpp"
#include "emulator/libcuda/api_call.hpp"

namespace emulator = spillover::emulator;
using emulator::Address;
using emulator::Context;
using emulator::HostRegion;
using emulator::HostRegionKind;
using emulator::Lock;
using emulator::Machine;
using emulator::note_bytes;
using emulator::with_context;
using emulator::with_unsafe_context;

namespace {

// Rows of a pitched allocation start at multiples of this.
constexpr std::size_t kPitchBytes = 512;

CUresult allocate_host(Machine& machine, const Context& context, std::size_t size_bytes,
                       HostRegionKind kind, unsigned flags, Address* address) {
  if (size_bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  const CUresult result =
      machine.host_memory.allocate({0, size_bytes, kind, flags, context.device}, address);
  if (result == CUDA_SUCCESS) machine.begin_memory(*address, size_bytes);
  return result;
}

// Whether the process has all of the pages; those of others cannot be pinned.
bool is_mapped(Address address, std::size_t size_bytes) {
  constexpr Address kPageBytes = 4096;
  const Address begin = address / kPageBytes * kPageBytes;
  if (size_bytes > SIZE_MAX - address) return false;
  // Starts no I/O, and fails where something is not mapped.
  return msync(reinterpret_cast<void*>(begin), address + size_bytes - begin, MS_ASYNC) == 0;
}

CUresult allocate_pinned(const char* name, void** pointer, std::size_t size_bytes, unsigned flags) {
  return with_unsafe_context(name, [=](Machine& machine, Lock&, Context& context) {
    constexpr unsigned kKnown =
        CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP | CU_MEMHOSTALLOC_WRITECOMBINED;
    if (pointer == nullptr || (flags & ~kKnown) != 0) return CUDA_ERROR_INVALID_VALUE;
    Address address = 0;
    const CUresult result =
        allocate_host(machine, context, size_bytes, HostRegionKind::kAllocated, flags, &address);
    if (result == CUDA_SUCCESS) *pointer = reinterpret_cast<void*>(address);
    if (machine.clock.enabled()) machine.clock.charge_pinning(size_bytes);
    return result;
  });
}

}  // namespace

extern "C" {

CUresult cuMemGetInfo(std::size_t* free_bytes, std::size_t* total_bytes) {
  return with_context(__func__, [=](Machine& machine, Lock&, Context& context) {
    if (free_bytes != nullptr) *free_bytes = machine.budget.free_bytes(context.device);
    if (total_bytes != nullptr) *total_bytes = machine.budget.capacity_bytes();
    return CUDA_SUCCESS;
  });
}

CUresult cuMemAlloc(CUdeviceptr* pointer, std::size_t size_bytes) {
  return with_unsafe_context(__func__, [=](Machine& machine, Lock& lock, Context& context) {
    if (pointer == nullptr) return CUDA_ERROR_INVALID_VALUE;
    Address address = 0;
    const CUresult result = emulator::allocate_device_memory(machine, lock, context.device,
                                                             size_bytes, nullptr, &address);
    if (result != CUDA_SUCCESS) return result;
    *pointer = address;
    note_bytes("cuMemAlloc", size_bytes);
    return CUDA_SUCCESS;
  });
}

CUresult cuMemAllocPitch(CUdeviceptr* pointer, std::size_t* pitch_bytes, std::size_t width_bytes,
                         std::size_t height, unsigned int element_bytes) {
  return with_unsafe_context(__func__, [=](Machine& machine, Lock& lock, Context& context) {
    const bool is_element = element_bytes == 4 || element_bytes == 8 || element_bytes == 16;
    if (pointer == nullptr || pitch_bytes == nullptr || !is_element) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    constexpr std::size_t kSizeMax = std::size_t{1} << 47U;
    if (width_bytes > kSizeMax || (width_bytes != 0 && height > kSizeMax / width_bytes)) {
      return CUDA_ERROR_OUT_OF_MEMORY;
    }
    const std::size_t pitch = emulator::round_up(width_bytes, kPitchBytes);
    Address address = 0;
    const CUresult result = emulator::allocate_device_memory(machine, lock, context.device,
                                                             pitch * height, nullptr, &address);
    if (result != CUDA_SUCCESS) return result;
    *pointer = address;
    *pitch_bytes = pitch;
    return CUDA_SUCCESS;
  });
}

CUresult cuMemFree(CUdeviceptr pointer) {
  return with_unsafe_context(__func__, [=](Machine& machine, Lock& lock, Context&) {
    if (pointer == 0) return CUDA_SUCCESS;
    const emulator::Allocation* allocation = machine.device_memory.find(pointer);
    const std::size_t size_bytes = allocation == nullptr ? 0 : allocation->size_bytes;
    const CUresult result = emulator::free_device_memory(machine, lock, pointer);
    if (result == CUDA_SUCCESS) note_bytes("cuMemFree", size_bytes);
    return result;
  });
}

CUresult cuMemAllocManaged(CUdeviceptr* pointer, std::size_t size_bytes, unsigned int flags) {
  return with_unsafe_context(__func__, [=](Machine& machine, Lock&, Context& context) {
    if (pointer == nullptr) return CUDA_ERROR_INVALID_VALUE;
    if (flags != CU_MEM_ATTACH_GLOBAL && flags != CU_MEM_ATTACH_HOST) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    Address address = 0;
    const CUresult result =
        allocate_host(machine, context, size_bytes, HostRegionKind::kManaged, flags, &address);
    if (result == CUDA_SUCCESS) *pointer = address;
    return result;
  });
}

CUresult cuMemAllocHost(void** pointer, std::size_t size_bytes) {
  return allocate_pinned(__func__, pointer, size_bytes, 0);
}

CUresult cuMemHostAlloc(void** pointer, std::size_t size_bytes, unsigned int flags) {
  return allocate_pinned(__func__, pointer, size_bytes, flags);
}

CUresult cuMemFreeHost(void* pointer) {
  return with_unsafe_context(__func__, [=](Machine& machine, Lock& lock, Context&) {
    if (pointer == nullptr) return CUDA_SUCCESS;
    return emulator::remove_host_region(machine, lock, reinterpret_cast<Address>(pointer),
                                        HostRegionKind::kAllocated);
  });
}

CUresult cuMemHostRegister(void* pointer, std::size_t size_bytes, unsigned int flags) {
  return with_unsafe_context(__func__, [=](Machine& machine, Lock&, Context& context) {
    constexpr unsigned kKnown =
        CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP | CU_MEMHOSTREGISTER_READ_ONLY;
    if ((flags & CU_MEMHOSTREGISTER_IOMEMORY) != 0) return CUDA_ERROR_NOT_SUPPORTED;
    const auto address = reinterpret_cast<Address>(pointer);
    if (pointer == nullptr || size_bytes == 0 || (flags & ~kKnown) != 0 ||
        machine.addresses.contains(address) || !is_mapped(address, size_bytes)) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    const CUresult added = machine.host_memory.add(
        {address, size_bytes, HostRegionKind::kRegistered, flags, context.device});
    if (added == CUDA_SUCCESS) machine.begin_memory(address, size_bytes);
    if (machine.clock.enabled()) machine.clock.charge_pinning(size_bytes);
    return added;
  });
}

CUresult cuMemHostUnregister(void* pointer) {
  return with_unsafe_context(__func__, [=](Machine& machine, Lock& lock, Context&) {
    if (pointer == nullptr) return CUDA_ERROR_INVALID_VALUE;
    return emulator::remove_host_region(machine, lock, reinterpret_cast<Address>(pointer),
                                        HostRegionKind::kRegistered);
  });
}

CUresult cuMemHostGetDevicePointer(CUdeviceptr* device_pointer, void* pointer, unsigned int flags) {
  return with_context(__func__, [=](Machine& machine, Lock&, Context&) {
    const auto address = reinterpret_cast<Address>(pointer);
    if (device_pointer == nullptr || flags != 0) return CUDA_ERROR_INVALID_VALUE;
    if (machine.host_memory.find(address) == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *device_pointer = address;  // unified addressing
    return CUDA_SUCCESS;
  });
}

CUresult cuMemHostGetFlags(unsigned int* flags, void* pointer) {
  return with_context(__func__, [=](Machine& machine, Lock&, Context&) {
    const HostRegion* region = machine.host_memory.find(reinterpret_cast<Address>(pointer));
    if (flags == nullptr || region == nullptr || region->kind != HostRegionKind::kAllocated) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    // Everything is mapped, and reported so, as on a 64-bit system with unified addressing.
    *flags = region->flags | CU_MEMHOSTALLOC_DEVICEMAP;
    return CUDA_SUCCESS;
  });
}

}  // extern "C"
