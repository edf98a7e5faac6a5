#include <cstring>

#include "emulator/libcudart/runtime.hpp"

namespace runtime = spillover::emulator::runtime;
using runtime::device_pointer;
using runtime::with_context;

namespace {

// The runtime's host memory flags have the driver's numbers.
static_assert(cudaHostAllocPortable == CU_MEMHOSTALLOC_PORTABLE);
static_assert(cudaHostAllocMapped == CU_MEMHOSTALLOC_DEVICEMAP);
static_assert(cudaHostAllocWriteCombined == CU_MEMHOSTALLOC_WRITECOMBINED);
static_assert(cudaHostRegisterPortable == CU_MEMHOSTREGISTER_PORTABLE);
static_assert(cudaHostRegisterMapped == CU_MEMHOSTREGISTER_DEVICEMAP);
static_assert(cudaHostRegisterIoMemory == CU_MEMHOSTREGISTER_IOMEMORY);
static_assert(cudaHostRegisterReadOnly == CU_MEMHOSTREGISTER_READ_ONLY);

constexpr unsigned int kElementBytes = 16;  // the largest that rows may be read and written in

// The runtime, unlike the driver, allows allocations of no bytes: they are null pointers.
CUresult allocate(void** pointer, size_t size) {
  if (pointer == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *pointer = nullptr;
  if (size == 0) return CUDA_SUCCESS;
  CUdeviceptr address = 0;
  const CUresult result = cuMemAlloc(&address, size);
  if (result == CUDA_SUCCESS) *pointer = runtime::host_pointer(address);
  return result;
}

CUresult allocate_host(void** pointer, size_t size, unsigned int flags) {
  if (pointer == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *pointer = nullptr;
  return size == 0 ? CUDA_SUCCESS : cuMemHostAlloc(pointer, size, flags);
}

// Whether all of the bytes are in one piece of managed memory.
CUresult check_managed(const void* pointer, size_t size) {
  if (pointer == nullptr || size == 0) return CUDA_ERROR_INVALID_VALUE;
  const CUdeviceptr address = device_pointer(pointer);
  unsigned int is_managed = 0;
  CUdeviceptr base = 0;
  size_t size_all = 0;
  CUresult result = cuPointerGetAttribute(&is_managed, CU_POINTER_ATTRIBUTE_IS_MANAGED, address);
  if (result == CUDA_SUCCESS) result = cuMemGetAddressRange(&base, &size_all, address);
  if (result != CUDA_SUCCESS) return result;
  return is_managed != 0 && size <= base + size_all - address ? CUDA_SUCCESS
                                                              : CUDA_ERROR_INVALID_VALUE;
}

// A device that exists, or the host.
CUresult check_location(const cudaMemLocation& location) {
  CUdevice device = 0;
  return location.type == cudaMemLocationTypeDevice ? cuDeviceGet(&device, location.id)
                                                    : CUDA_SUCCESS;
}

// Fills a runtime's description of a pointer; a pointer that CUDA does not know is not an error.
CUresult describe(cudaPointerAttributes& attributes, const void* pointer) {
  std::memset(&attributes, 0, sizeof attributes);
  const CUdeviceptr address = device_pointer(pointer);
  unsigned int type = 0;
  if (cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, address) != CUDA_SUCCESS) {
    attributes.type = cudaMemoryTypeUnregistered;
    attributes.device = cudaInvalidDeviceId;
    attributes.hostPointer = const_cast<void*>(pointer);
    return CUDA_SUCCESS;
  }
  unsigned int managed = 0;
  if (cuPointerGetAttribute(&managed, CU_POINTER_ATTRIBUTE_IS_MANAGED, address) != CUDA_SUCCESS) {
    managed = 0;
  }
  if (managed != 0) {
    attributes.type = cudaMemoryTypeManaged;
  } else {
    attributes.type = type == CU_MEMORYTYPE_HOST ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
  }
  const CUresult result =
      cuPointerGetAttribute(&attributes.device, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address);
  if (result != CUDA_SUCCESS) return result;
  CUdeviceptr on_device = address;
  if (cuPointerGetAttribute(&on_device, CU_POINTER_ATTRIBUTE_DEVICE_POINTER, address) ==
      CUDA_SUCCESS) {
    attributes.devicePointer = runtime::host_pointer(on_device);
  }
  if (attributes.type != cudaMemoryTypeDevice) {
    attributes.hostPointer = const_cast<void*>(pointer);
  }
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

cudaError_t cudaMalloc(void** pointer, size_t size) {
  return with_context(__func__, [=] { return allocate(pointer, size); });
}

cudaError_t cudaMallocPitch(void** pointer, size_t* pitch, size_t width, size_t height) {
  return with_context(__func__, [=] {
    if (pointer == nullptr || pitch == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *pointer = nullptr;
    *pitch = 0;
    if (width == 0 || height == 0) return CUDA_SUCCESS;
    CUdeviceptr address = 0;
    const CUresult result = cuMemAllocPitch(&address, pitch, width, height, kElementBytes);
    if (result == CUDA_SUCCESS) *pointer = runtime::host_pointer(address);
    return result;
  });
}

cudaError_t cudaMallocManaged(void** pointer, size_t size, unsigned int flags) {
  return with_context(__func__, [=] {
    if (pointer == nullptr) return CUDA_ERROR_INVALID_VALUE;
    CUdeviceptr address = 0;
    const CUresult result = cuMemAllocManaged(&address, size, flags);
    if (result == CUDA_SUCCESS) *pointer = runtime::host_pointer(address);
    return result;
  });
}

cudaError_t cudaFree(void* pointer) {
  return with_context(__func__, [=] {
    return pointer == nullptr ? CUDA_SUCCESS : cuMemFree(device_pointer(pointer));
  });
}

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  return with_context(__func__, [=] { return cuMemGetInfo(free_bytes, total_bytes); });
}

cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned int flags) {
  return with_context(__func__, [=] { return allocate_host(pointer, size, flags); });
}

cudaError_t cudaMallocHost(void** pointer, size_t size) {
  return with_context(__func__, [=] { return allocate_host(pointer, size, 0); });
}

cudaError_t cudaFreeHost(void* pointer) {
  return with_context(__func__,
                      [=] { return pointer == nullptr ? CUDA_SUCCESS : cuMemFreeHost(pointer); });
}

cudaError_t cudaHostRegister(void* pointer, size_t size, unsigned int flags) {
  return with_context(__func__, [=] { return cuMemHostRegister(pointer, size, flags); });
}

cudaError_t cudaHostUnregister(void* pointer) {
  return with_context(__func__, [=] { return cuMemHostUnregister(pointer); });
}

cudaError_t cudaHostGetDevicePointer(void** result, void* pointer, unsigned int flags) {
  return with_context(__func__, [=] {
    if (result == nullptr) return CUDA_ERROR_INVALID_VALUE;
    CUdeviceptr address = 0;
    const CUresult outcome = cuMemHostGetDevicePointer(&address, pointer, flags);
    if (outcome == CUDA_SUCCESS) *result = runtime::host_pointer(address);
    return outcome;
  });
}

cudaError_t cudaHostGetFlags(unsigned int* flags, void* pointer) {
  return with_context(__func__, [=] { return cuMemHostGetFlags(flags, pointer); });
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  return with_context(__func__, [=] {
    return attributes == nullptr ? CUDA_ERROR_INVALID_VALUE : describe(*attributes, pointer);
  });
}

// Managed memory never moves here, so hints about where it should be are checked and dropped.
cudaError_t cudaMemPrefetchAsync(const void* pointer, size_t count, cudaMemLocation location,
                                 unsigned int flags, cudaStream_t stream) {
  return with_context(__func__, [=] {
    CUresult result = flags != 0 ? CUDA_ERROR_INVALID_VALUE : check_managed(pointer, count);
    if (result == CUDA_SUCCESS) result = check_location(location);
    unsigned int stream_flags = 0;
    return result == CUDA_SUCCESS ? cuStreamGetFlags(stream, &stream_flags) : result;
  });
}

cudaError_t cudaMemAdvise(const void* pointer, size_t count, cudaMemoryAdvise advice,
                          cudaMemLocation location) {
  return with_context(__func__, [=] {
    if (advice < cudaMemAdviseSetReadMostly || advice > cudaMemAdviseUnsetAccessedBy) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    const CUresult result = check_managed(pointer, count);
    const bool has_place = advice == cudaMemAdviseSetPreferredLocation ||
                           advice == cudaMemAdviseSetAccessedBy ||
                           advice == cudaMemAdviseUnsetAccessedBy;
    return result == CUDA_SUCCESS && has_place ? check_location(location) : result;
  });
}

}  // extern "C"
