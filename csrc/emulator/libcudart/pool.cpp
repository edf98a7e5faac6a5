#include <cstring>

#include "emulator/libcudart/runtime.hpp"

namespace runtime = spillover::emulator::runtime;
using runtime::with_context;
using runtime::with_driver;

namespace {

// Pools, their properties and attributes are the driver's own, under other names.
static_assert(sizeof(cudaMemPoolProps) == sizeof(CUmemPoolProps));
static_assert(sizeof(cudaMemAccessDesc) == sizeof(CUmemAccessDesc));
static_assert(sizeof(cudaMemLocation) == sizeof(CUmemLocation));
static_assert(static_cast<int>(cudaMemPoolAttrReleaseThreshold) ==
              static_cast<int>(CU_MEMPOOL_ATTR_RELEASE_THRESHOLD));
static_assert(static_cast<int>(cudaGraphMemAttrReservedMemHigh) ==
              static_cast<int>(CU_GRAPH_MEM_ATTR_RESERVED_MEM_HIGH));
static_assert(static_cast<int>(cudaMemPoolAttrUsedMemHigh) ==
              static_cast<int>(CU_MEMPOOL_ATTR_USED_MEM_HIGH));

CUmemPool_attribute to_driver(cudaMemPoolAttr attribute) {
  return static_cast<CUmemPool_attribute>(attribute);
}

CUresult device_handle(int ordinal, CUdevice* device) {
  return cuDeviceGet(device, ordinal);
}

}  // namespace

extern "C" {

cudaError_t cudaMallocAsync(void** pointer, size_t size, cudaStream_t stream) {
  return with_context(__func__, [=] {
    if (pointer == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *pointer = nullptr;
    CUdeviceptr address = 0;
    const CUresult result = cuMemAllocAsync(&address, size, stream);
    if (result == CUDA_SUCCESS) *pointer = runtime::host_pointer(address);
    return result;
  });
}

cudaError_t cudaMallocFromPoolAsync(void** pointer, size_t size, cudaMemPool_t pool,
                                    cudaStream_t stream) {
  return with_context(__func__, [=] {
    if (pointer == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *pointer = nullptr;
    CUdeviceptr address = 0;
    const CUresult result = cuMemAllocFromPoolAsync(&address, size, pool, stream);
    if (result == CUDA_SUCCESS) *pointer = runtime::host_pointer(address);
    return result;
  });
}

cudaError_t cudaFreeAsync(void* pointer, cudaStream_t stream) {
  return with_context(__func__, [=] {
    return pointer == nullptr ? CUDA_SUCCESS
                              : cuMemFreeAsync(runtime::device_pointer(pointer), stream);
  });
}

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int ordinal) {
  return with_driver(__func__, [=] {
    CUdevice device = 0;
    const CUresult result = device_handle(ordinal, &device);
    return result == CUDA_SUCCESS ? cuDeviceGetDefaultMemPool(pool, device) : result;
  });
}

cudaError_t cudaDeviceGetMemPool(cudaMemPool_t* pool, int ordinal) {
  return with_driver(__func__, [=] {
    CUdevice device = 0;
    const CUresult result = device_handle(ordinal, &device);
    return result == CUDA_SUCCESS ? cuDeviceGetMemPool(pool, device) : result;
  });
}

cudaError_t cudaDeviceSetMemPool(int ordinal, cudaMemPool_t pool) {
  return with_driver(__func__, [=] {
    CUdevice device = 0;
    const CUresult result = device_handle(ordinal, &device);
    return result == CUDA_SUCCESS ? cuDeviceSetMemPool(device, pool) : result;
  });
}

cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps* properties) {
  return with_context(__func__, [=] {
    if (pool == nullptr || properties == nullptr) return CUDA_ERROR_INVALID_VALUE;
    CUmemPoolProps copy{};
    std::memcpy(&copy, properties, sizeof copy);
    return cuMemPoolCreate(pool, &copy);
  });
}

cudaError_t cudaMemPoolDestroy(cudaMemPool_t pool) {
  return with_context(__func__, [=] { return cuMemPoolDestroy(pool); });
}

cudaError_t cudaMemPoolTrimTo(cudaMemPool_t pool, size_t keep_bytes) {
  return with_context(__func__, [=] { return cuMemPoolTrimTo(pool, keep_bytes); });
}

cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, cudaMemPoolAttr attribute, void* value) {
  return with_context(__func__,
                      [=] { return cuMemPoolGetAttribute(pool, to_driver(attribute), value); });
}

cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool, cudaMemPoolAttr attribute, void* value) {
  return with_context(__func__,
                      [=] { return cuMemPoolSetAttribute(pool, to_driver(attribute), value); });
}

cudaError_t cudaMemPoolSetAccess(cudaMemPool_t pool, const cudaMemAccessDesc* accesses,
                                 size_t count) {
  return with_context(__func__, [=] {
    return cuMemPoolSetAccess(pool, reinterpret_cast<const CUmemAccessDesc*>(accesses), count);
  });
}

cudaError_t cudaMemPoolGetAccess(cudaMemAccessFlags* flags, cudaMemPool_t pool,
                                 cudaMemLocation* location) {
  return with_context(__func__, [=] {
    if (flags == nullptr) return CUDA_ERROR_INVALID_VALUE;
    CUmemAccess_flags access{};
    const CUresult result =
        cuMemPoolGetAccess(&access, pool, reinterpret_cast<CUmemLocation*>(location));
    if (result == CUDA_SUCCESS) *flags = static_cast<cudaMemAccessFlags>(access);
    return result;
  });
}

cudaError_t cudaDeviceGetGraphMemAttribute(int device, cudaGraphMemAttributeType attribute,
                                           void* value) {
  return with_driver(__func__, [=] {
    return cuDeviceGetGraphMemAttribute(device, static_cast<CUgraphMem_attribute>(attribute),
                                        value);
  });
}

cudaError_t cudaDeviceSetGraphMemAttribute(int device, cudaGraphMemAttributeType attribute,
                                           void* value) {
  return with_driver(__func__, [=] {
    return cuDeviceSetGraphMemAttribute(device, static_cast<CUgraphMem_attribute>(attribute),
                                        value);
  });
}

cudaError_t cudaDeviceGraphMemTrim(int device) {
  return with_driver(__func__, [=] { return cuDeviceGraphMemTrim(device); });
}

}  // extern "C"
