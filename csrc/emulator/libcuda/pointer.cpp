// What a pointer is: cuPointerGetAttribute and friends.
#include <optional>

#include "emulator/libcuda/api_call.hpp"

namespace emulator = spillover::emulator;
using emulator::Address;
using emulator::Lock;
using emulator::Machine;
using emulator::with_driver;

namespace {

// Memory that CUDA knows: an allocation, a mapping or a host region.
struct Known {
  Address base = 0;
  std::size_t size_bytes = 0;
  int device = 0;
  bool is_host = false;
  bool is_managed = false;
  bool is_exportable = false;  // by cuIpcGetMemHandle
  CUmemoryPool pool = nullptr;
  unsigned long long handle_types = 0;
};

std::optional<Known> look_up(Machine& machine, Address address) {
  if (const auto* allocation = machine.device_memory.find(address)) {
    Known known{allocation->address, allocation->size_bytes, allocation->device};
    known.is_exportable = !allocation->managed_by_pool() && !allocation->is_imported();
    if (allocation->pool != nullptr) known.pool = allocation->pool->handle;
    return known;
  }
  if (const auto* mapping = machine.virtual_memory.find_mapping(address)) {
    const auto& store = machine.virtual_memory;
    Known known{mapping->address, mapping->size_bytes, store.device_of(*mapping)};
    known.handle_types = store.handle_types_of(*mapping);
    return known;
  }
  if (const auto* region = machine.host_memory.find(address)) {
    Known known{region->address, region->size_bytes, region->device};
    known.is_managed = region->kind == emulator::HostRegionKind::kManaged;
    known.is_host = !known.is_managed;
    return known;
  }
  return std::nullopt;
}

// Whether CUDA has such an attribute at all.
bool is_attribute(CUpointer_attribute attribute) {
  return attribute >= CU_POINTER_ATTRIBUTE_CONTEXT &&
         attribute <= CU_POINTER_ATTRIBUTE_IS_HW_DECOMPRESS_CAPABLE;
}

template <typename Value>
CUresult put(void* out, Value value) {
  *static_cast<Value*>(out) = value;
  return CUDA_SUCCESS;
}

CUresult attribute_of(Machine& machine, const Known& known, Address address,
                      CUpointer_attribute attribute, void* out) {
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_CONTEXT:
      return put(out, machine.contexts.primary(known.device)->handle());
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
      return put(out, known.is_host ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE);
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
      return put(out, static_cast<CUdeviceptr>(address));
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
      if (!known.is_host && !known.is_managed) return CUDA_ERROR_INVALID_VALUE;
      return put(out, reinterpret_cast<void*>(address));
    case CU_POINTER_ATTRIBUTE_SYNC_MEMOPS:
      return put(out, 0U);
    case CU_POINTER_ATTRIBUTE_BUFFER_ID:
      return put(out, static_cast<unsigned long long>(known.base >> 9));
    case CU_POINTER_ATTRIBUTE_IS_MANAGED:
      return put(out, known.is_managed ? 1U : 0U);
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
      return put(out, known.device);
    case CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE:
      return put(out, known.is_exportable ? 1U : 0U);
    case CU_POINTER_ATTRIBUTE_IS_GPU_DIRECT_RDMA_CAPABLE:
      return put(out, 0U);
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
      return put(out, static_cast<CUdeviceptr>(known.base));
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
      return put(out, known.size_bytes);
    case CU_POINTER_ATTRIBUTE_MAPPED:
      return put(out, 1U);
    case CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES:
      return put(out, known.handle_types);
    case CU_POINTER_ATTRIBUTE_ACCESS_FLAGS:
      return put(out, static_cast<unsigned>(CU_POINTER_ATTRIBUTE_ACCESS_FLAG_READWRITE));
    case CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE:
      return put(out, known.pool);
    default:
      return is_attribute(attribute) ? CUDA_ERROR_NOT_SUPPORTED : CUDA_ERROR_INVALID_VALUE;
  }
}

// What cuPointerGetAttributes writes where a pointer is unknown or has no such attribute.
void put_default(CUpointer_attribute attribute, void* out) {
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_CONTEXT:
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
    case CU_POINTER_ATTRIBUTE_BUFFER_ID:
    case CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES:
    case CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE:
      put(out, std::uint64_t{0});
      break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
      put(out, -2);  // CUDA's "no device"
      break;
    default:
      put(out, 0U);
  }
}

}  // namespace

extern "C" {

CUresult cuPointerGetAttribute(void* out, CUpointer_attribute attribute, CUdeviceptr pointer) {
  return with_driver(__func__, [=](Machine& machine, Lock&) {
    if (out == nullptr) return CUDA_ERROR_INVALID_VALUE;
    const auto known = look_up(machine, pointer);
    if (!known) return CUDA_ERROR_INVALID_VALUE;
    return attribute_of(machine, *known, pointer, attribute, out);
  });
}

CUresult cuPointerGetAttributes(unsigned int count, CUpointer_attribute* attributes, void** outs,
                                CUdeviceptr pointer) {
  return with_driver(__func__, [=](Machine& machine, Lock&) {
    if (attributes == nullptr || outs == nullptr) return CUDA_ERROR_INVALID_VALUE;
    const auto known = look_up(machine, pointer);
    for (unsigned i = 0; i < count; ++i) {
      if (outs[i] == nullptr || !is_attribute(attributes[i])) return CUDA_ERROR_INVALID_VALUE;
      if (!known ||
          attribute_of(machine, *known, pointer, attributes[i], outs[i]) != CUDA_SUCCESS) {
        put_default(attributes[i], outs[i]);
      }
    }
    return CUDA_SUCCESS;
  });
}

CUresult cuPointerSetAttribute(const void* value, CUpointer_attribute attribute,
                               CUdeviceptr pointer) {
  return with_driver(__func__, [=](Machine& machine, Lock&) {
    if (value == nullptr || !look_up(machine, pointer)) return CUDA_ERROR_INVALID_VALUE;
    // Synchronous memory operations are the only attribute that can be set.
    if (attribute != CU_POINTER_ATTRIBUTE_SYNC_MEMOPS) return CUDA_ERROR_INVALID_VALUE;
    emulator::report("memory whose operations are all synchronous is not emulated");
    return CUDA_ERROR_NOT_SUPPORTED;
  });
}

CUresult cuMemGetAddressRange(CUdeviceptr* base, std::size_t* size_bytes, CUdeviceptr pointer) {
  return with_driver(__func__, [=](Machine& machine, Lock&) {
    const auto known = look_up(machine, pointer);
    if (!known) return CUDA_ERROR_NOT_FOUND;
    if (base != nullptr) *base = known->base;
    if (size_bytes != nullptr) *size_bytes = known->size_bytes;
    return CUDA_SUCCESS;
  });
}

}  // extern "C"
