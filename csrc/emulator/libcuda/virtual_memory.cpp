// CUDA's virtual memory functions.
#include "emulator/core/virtual_memory.hpp"

#include "emulator/core/config.hpp"
#include "emulator/core/lifetimes.hpp"
#include "emulator/libcuda/api_call.hpp"

namespace emulator = spillover::emulator;
using emulator::Address;
using emulator::is_device;
using emulator::Lock;
using emulator::Machine;
using emulator::note_bytes;

namespace {

// with_driver, for devices that have virtual memory at all.
template <typename Body>
CUresult with_virtual_memory(const char* name, Body&& body) {
  return emulator::with_driver(name, [&](Machine& machine, Lock& lock) {
    return emulator::config().virtual_memory ? body(machine, lock) : CUDA_ERROR_NOT_SUPPORTED;
  });
}

// Whether an allocation can be made with these properties. Memory in host NUMA nodes and fabric
// handles are not emulated.
CUresult check_properties(const Machine& machine, const CUmemAllocationProp* properties) {
  if (properties == nullptr || properties->type != CU_MEM_ALLOCATION_TYPE_PINNED) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (properties->location.type != CU_MEM_LOCATION_TYPE_DEVICE) return CUDA_ERROR_NOT_SUPPORTED;
  if (!is_device(machine, properties->location.id)) return CUDA_ERROR_INVALID_DEVICE;
  const auto types = properties->requestedHandleTypes;
  return types == CU_MEM_HANDLE_TYPE_NONE || types == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
             ? CUDA_SUCCESS
             : CUDA_ERROR_NOT_SUPPORTED;
}

CUresult check_descriptor(const Machine& machine, const CUmemAccessDesc& descriptor) {
  if (descriptor.location.type != CU_MEM_LOCATION_TYPE_DEVICE) return CUDA_ERROR_NOT_SUPPORTED;
  if (!is_device(machine, descriptor.location.id)) return CUDA_ERROR_INVALID_DEVICE;
  const bool is_known = descriptor.flags == CU_MEM_ACCESS_FLAGS_PROT_NONE ||
                        descriptor.flags == CU_MEM_ACCESS_FLAGS_PROT_READ ||
                        descriptor.flags == CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  return is_known ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

}  // namespace

extern "C" {

CUresult cuMemGetAllocationGranularity(std::size_t* granularity,
                                       const CUmemAllocationProp* properties,
                                       CUmemAllocationGranularity_flags option) {
  return with_virtual_memory(__func__, [=](Machine& machine, Lock&) {
    const bool is_option = option == CU_MEM_ALLOC_GRANULARITY_MINIMUM ||
                           option == CU_MEM_ALLOC_GRANULARITY_RECOMMENDED;
    if (granularity == nullptr || !is_option) return CUDA_ERROR_INVALID_VALUE;
    const CUresult result = check_properties(machine, properties);
    if (result == CUDA_SUCCESS) *granularity = emulator::kGranularityBytes;
    return result;
  });
}

CUresult cuMemAddressReserve(CUdeviceptr* pointer, std::size_t size_bytes, std::size_t alignment,
                             CUdeviceptr hint, unsigned long long flags) {
  return with_virtual_memory(__func__, [=](Machine& machine, Lock&) {
    if (pointer == nullptr || flags != 0) return CUDA_ERROR_INVALID_VALUE;
    Address address = 0;
    const CUresult result = machine.virtual_memory.reserve(size_bytes, alignment, hint, &address);
    if (result != CUDA_SUCCESS) return result;
    *pointer = address;
    note_bytes("cuMemAddressReserve", size_bytes);
    return CUDA_SUCCESS;
  });
}

CUresult cuMemAddressFree(CUdeviceptr pointer, std::size_t size_bytes) {
  return with_virtual_memory(__func__, [=](Machine& machine, Lock&) {
    return machine.virtual_memory.free_reservation(pointer, size_bytes);
  });
}

CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, std::size_t size_bytes,
                     const CUmemAllocationProp* properties, unsigned long long flags) {
  return with_virtual_memory(__func__, [=](Machine& machine, Lock&) {
    if (handle == nullptr || flags != 0) return CUDA_ERROR_INVALID_VALUE;
    const CUresult result = check_properties(machine, properties);
    if (result != CUDA_SUCCESS) return result;
    emulator::PhysicalId id = 0;
    const CUresult created = machine.virtual_memory.create(size_bytes, *properties, &id);
    if (created != CUDA_SUCCESS) return created;
    *handle = id;
    note_bytes("cuMemCreate", size_bytes);
    return CUDA_SUCCESS;
  });
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  return with_virtual_memory(__func__, [=](Machine& machine, Lock&) {
    const auto* physical = machine.virtual_memory.physical(handle);
    const std::size_t size_bytes = physical == nullptr ? 0 : physical->size_bytes;
    const CUresult released = machine.virtual_memory.release(handle);
    if (released == CUDA_SUCCESS) note_bytes("cuMemRelease", size_bytes);
    return released;
  });
}

CUresult cuMemMap(CUdeviceptr pointer, std::size_t size_bytes, std::size_t offset_bytes,
                  CUmemGenericAllocationHandle handle, unsigned long long flags) {
  return with_virtual_memory(__func__, [=](Machine& machine, Lock&) {
    if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
    const CUresult mapped = machine.virtual_memory.map(pointer, size_bytes, offset_bytes, handle);
    if (mapped != CUDA_SUCCESS) return mapped;
    note_bytes("cuMemMap", size_bytes);
    machine.follow_mapping(pointer, size_bytes);
    if (machine.virtual_memory.physical(handle)->is_imported()) {
      machine.note_foreign_writes(__func__, pointer, size_bytes);
    }
    return CUDA_SUCCESS;
  });
}

CUresult cuMemUnmap(CUdeviceptr pointer, std::size_t size_bytes) {
  return with_virtual_memory(__func__, [=](Machine& machine, Lock& lock) {
    const CUresult unmapped = emulator::unmap_memory(machine, lock, pointer, size_bytes);
    if (unmapped == CUDA_SUCCESS) note_bytes("cuMemUnmap", size_bytes);
    return unmapped;
  });
}

CUresult cuMemSetAccess(CUdeviceptr pointer, std::size_t size_bytes,
                        const CUmemAccessDesc* descriptors, std::size_t count) {
  return with_virtual_memory(__func__, [=](Machine& machine, Lock&) {
    if (descriptors == nullptr || count == 0) return CUDA_ERROR_INVALID_VALUE;
    for (std::size_t i = 0; i < count; ++i) {
      const CUresult result = check_descriptor(machine, descriptors[i]);
      if (result != CUDA_SUCCESS) return result;
    }
    for (std::size_t i = 0; i < count; ++i) {
      const CUresult result = machine.virtual_memory.set_access(
          pointer, size_bytes, descriptors[i].location.id, descriptors[i].flags);
      if (result != CUDA_SUCCESS) return result;
    }
    note_bytes("cuMemSetAccess", size_bytes);
    return CUDA_SUCCESS;
  });
}

CUresult cuMemGetAccess(unsigned long long* flags, const CUmemLocation* location,
                        CUdeviceptr pointer) {
  return with_virtual_memory(__func__, [=](Machine& machine, Lock&) {
    if (flags == nullptr || location == nullptr) return CUDA_ERROR_INVALID_VALUE;
    if (location->type != CU_MEM_LOCATION_TYPE_DEVICE) return CUDA_ERROR_NOT_SUPPORTED;
    if (!is_device(machine, location->id)) return CUDA_ERROR_INVALID_DEVICE;
    const auto* mapping = machine.virtual_memory.find_mapping(pointer);
    if (mapping == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *flags = mapping->device_access[static_cast<std::size_t>(location->id)];
    return CUDA_SUCCESS;
  });
}

CUresult cuMemExportToShareableHandle(void* shareable, CUmemGenericAllocationHandle handle,
                                      CUmemAllocationHandleType type, unsigned long long flags) {
  return with_virtual_memory(__func__, [=](Machine& machine, Lock&) {
    if (shareable == nullptr || flags != 0) return CUDA_ERROR_INVALID_VALUE;
    if (type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) return CUDA_ERROR_NOT_SUPPORTED;
    return machine.virtual_memory.export_file(handle, static_cast<int*>(shareable));
  });
}

CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle* handle, void* shareable,
                                        CUmemAllocationHandleType type) {
  return with_virtual_memory(__func__, [=](Machine& machine, Lock&) {
    if (handle == nullptr) return CUDA_ERROR_INVALID_VALUE;
    if (type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) return CUDA_ERROR_NOT_SUPPORTED;
    const emulator::Context* context = emulator::CurrentContext::get();
    const int file = static_cast<int>(reinterpret_cast<std::intptr_t>(shareable));
    emulator::PhysicalId id = 0;
    const CUresult result =
        machine.virtual_memory.import_file(file, context == nullptr ? 0 : context->device, &id);
    if (result == CUDA_SUCCESS) *handle = id;
    return result;
  });
}

CUresult cuMemRetainAllocationHandle(CUmemGenericAllocationHandle* handle, void* address) {
  return with_virtual_memory(__func__, [=](Machine& machine, Lock&) {
    if (handle == nullptr) return CUDA_ERROR_INVALID_VALUE;
    emulator::PhysicalId id = 0;
    const CUresult result = machine.virtual_memory.retain(reinterpret_cast<Address>(address), &id);
    if (result == CUDA_SUCCESS) *handle = id;
    return result;
  });
}

CUresult cuMemGetAllocationPropertiesFromHandle(CUmemAllocationProp* properties,
                                                CUmemGenericAllocationHandle handle) {
  return with_virtual_memory(__func__, [=](Machine& machine, Lock&) {
    const auto* physical = machine.virtual_memory.physical(handle);
    if (properties == nullptr || physical == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *properties = physical->properties;
    return CUDA_SUCCESS;
  });
}

}  // extern "C"
