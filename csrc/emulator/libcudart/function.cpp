#include <algorithm>
#include <cstring>

#include "emulator/libcudart/kernels.hpp"
#include "emulator/libcudart/runtime.hpp"

namespace runtime = spillover::emulator::runtime;
using runtime::attribute_of;
using runtime::plain;
using runtime::with_context;
using runtime::with_driver;

namespace {

constexpr int kWarpThreads = 32;
constexpr int kRegistersPerThread =
    32;  // an ordinary kernel; its real number is in the GPU's binary

int compute_capability(CUdevice device) {
  return 10 * attribute_of(device, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) +
         attribute_of(device, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
}

cudaError_t check_function(const void* function) {
  return runtime::find_kernel(function) != nullptr ? cudaSuccess : cudaErrorInvalidDeviceFunction;
}

// The limit on a kernel's dynamic shared memory that a function attribute may raise.
cudaError_t check_attribute(cudaFuncAttribute attribute, int value, CUdevice device) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    const int limit = attribute_of(device, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
    return value >= 0 && value <= limit ? cudaSuccess : cudaErrorInvalidValue;
  }
  return attribute > 0 && attribute < cudaFuncAttributeMax ? cudaSuccess : cudaErrorInvalidValue;
}

// How many blocks a multiprocessor holds at a time, by threads, shared memory and block slots.
cudaError_t active_blocks(int* blocks, const void* function, int block_threads,
                          size_t shared_bytes) {
  if (blocks == nullptr || block_threads <= 0) return cudaErrorInvalidValue;
  const cudaError_t error = check_function(function);
  if (error != cudaSuccess) return error;
  CUdevice device = 0;
  const CUresult known = runtime::current_device(&device);
  if (known != CUDA_SUCCESS) return runtime::to_runtime(known);
  *blocks = 0;
  if (block_threads > attribute_of(device, CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK)) {
    return cudaSuccess;
  }
  const int whole_warps = (block_threads + kWarpThreads - 1) / kWarpThreads * kWarpThreads;
  int count =
      attribute_of(device, CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR) / whole_warps;
  const int slots = attribute_of(device, CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR);
  if (slots > 0) count = std::min(count, slots);
  const size_t shared_each =
      shared_bytes + static_cast<size_t>(attribute_of(
                         device, CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK));
  const auto shared_all = static_cast<size_t>(
      attribute_of(device, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR));
  if (shared_each > 0) count = std::min(count, static_cast<int>(shared_all / shared_each));
  *blocks = count;
  return cudaSuccess;
}

}  // namespace

extern "C" {

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  return with_context(__func__, [=] {
    if (attributes == nullptr) return cudaErrorInvalidValue;
    const cudaError_t error = check_function(function);
    if (error != cudaSuccess) return error;
    CUdevice device = 0;
    const CUresult known = runtime::current_device(&device);
    if (known != CUDA_SUCCESS) return runtime::to_runtime(known);
    std::memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock =
        attribute_of(device, CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK);
    attributes->numRegs = kRegistersPerThread;
    attributes->binaryVersion = compute_capability(device);
    attributes->ptxVersion = attributes->binaryVersion;
    attributes->maxDynamicSharedSizeBytes =
        attribute_of(device, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK);
    attributes->preferredShmemCarveout = cudaSharedmemCarveoutDefault;
    return cudaSuccess;
  });
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  return with_context(__func__, [=] {
    const cudaError_t error = check_function(function);
    if (error != cudaSuccess) return error;
    CUdevice device = 0;
    const CUresult known = runtime::current_device(&device);
    if (known != CUDA_SUCCESS) return runtime::to_runtime(known);
    return check_attribute(attribute, value, device);
  });
}

cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t kernel, cudaFuncAttribute attribute,
                                            int value, int device) {
  return with_driver(__func__, [=] {
    const cudaError_t error = check_function(kernel);
    return error == cudaSuccess ? check_attribute(attribute, value, device) : error;
  });
}

cudaError_t cudaFuncSetCacheConfig(const void* function, cudaFuncCache) {
  return plain(__func__, [=] { return check_function(function); });
}

cudaError_t cudaFuncGetName(const char** name, const void* function) {
  return plain(__func__, [=] {
    const runtime::Kernel* const kernel = runtime::find_kernel(function);
    if (name == nullptr) return cudaErrorInvalidValue;
    if (kernel == nullptr) return cudaErrorInvalidDeviceFunction;
    *name = kernel->name;
    return cudaSuccess;
  });
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function,
                                                          int block_threads, size_t shared_bytes) {
  return with_context(__func__,
                      [=] { return active_blocks(blocks, function, block_threads, shared_bytes); });
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* blocks, const void* function, int block_threads, size_t shared_bytes, unsigned int) {
  return with_context(__func__,
                      [=] { return active_blocks(blocks, function, block_threads, shared_bytes); });
}

}  // extern "C"
