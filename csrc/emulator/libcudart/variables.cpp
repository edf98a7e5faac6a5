#include <algorithm>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "emulator/libcudart/kernels.hpp"
#include "emulator/libcudart/runtime.hpp"

namespace spillover::emulator::runtime {
namespace {

// A __device__ or __constant__ variable. Each device gets a copy at first use, filled with zeros:
// the initial value is in the GPU's binary, which is not read.
struct Variable {
  const Module* module = nullptr;
  size_t size_bytes = 0;
  std::unordered_map<CUdevice, CUdeviceptr> copies;
};

std::mutex variables_mutex;

// Guarded by variables_mutex; never destroyed, see kernels.hpp.
std::unordered_map<const void*, Variable>& variables() {
  static auto* const instance = new std::unordered_map<const void*, Variable>;
  return *instance;
}

CUresult new_copy(CUdeviceptr* copy, size_t size_bytes) {
  CUresult result = cuMemAlloc(copy, size_bytes);
  if (result == CUDA_SUCCESS) result = cuMemsetD8(*copy, 0, size_bytes);
  return result;
}

cudaError_t find_copy(const void* symbol, CUdevice device, CUdeviceptr* copy, size_t* size_bytes) {
  const std::lock_guard lock(variables_mutex);
  const auto found = variables().find(symbol);
  if (found == variables().end()) return cudaErrorInvalidSymbol;
  *size_bytes = found->second.size_bytes;
  const auto existing = found->second.copies.find(device);
  *copy = existing != found->second.copies.end() ? existing->second : 0;
  return cudaSuccess;
}

// The variable's copy on the current device, made where it is missing. No driver call is made under
// the lock, so two threads may both make one; the second is given back.
cudaError_t locate(const void* symbol, CUdeviceptr* copy, size_t* size_bytes) {
  CUdevice device = 0;
  const CUresult known = current_device(&device);
  if (known != CUDA_SUCCESS) return to_runtime(known);
  const cudaError_t error = find_copy(symbol, device, copy, size_bytes);
  if (error != cudaSuccess || *copy != 0) return error;
  CUdeviceptr fresh = 0;
  const CUresult result = new_copy(&fresh, *size_bytes);
  if (result != CUDA_SUCCESS) return to_runtime(result);
  {
    const std::lock_guard lock(variables_mutex);
    const auto found = variables().find(symbol);
    if (found != variables().end())
      *copy = found->second.copies.emplace(device, fresh).first->second;
  }
  return *copy == fresh ? cudaSuccess : to_runtime(cuMemFree(fresh));
}

// The bytes [offset, offset + count) of a variable.
cudaError_t locate_range(const void* symbol, size_t offset, size_t count, CUdeviceptr* address) {
  size_t size_bytes = 0;
  const cudaError_t error = locate(symbol, address, &size_bytes);
  if (error != cudaSuccess) return error;
  if (offset > size_bytes || count > size_bytes - offset) return cudaErrorInvalidValue;
  *address += offset;
  return cudaSuccess;
}

}  // namespace

void add_variable(Module* module, const void* host_variable, size_t size_bytes) {
  const std::lock_guard lock(variables_mutex);
  variables()[host_variable] = Variable{module, size_bytes, {}};
}

// Runs in static destructors, when the driver may be gone: the copies' memory is left to the
// context.
void remove_variables(const Module* module) {
  const std::lock_guard lock(variables_mutex);
  std::erase_if(variables(), [=](const auto& entry) { return entry.second.module == module; });
}

void forget_device_variables(int device) noexcept {
  const std::lock_guard lock(variables_mutex);
  for (auto& entry : variables()) entry.second.copies.erase(device);
}

}  // namespace spillover::emulator::runtime

namespace runtime = spillover::emulator::runtime;
using runtime::with_context;

extern "C" {

cudaError_t cudaGetSymbolAddress(void** address, const void* symbol) {
  return with_context(__func__, [=] {
    if (address == nullptr) return cudaErrorInvalidValue;
    CUdeviceptr copy = 0;
    const cudaError_t error = runtime::locate_range(symbol, 0, 0, &copy);
    if (error == cudaSuccess) *address = runtime::host_pointer(copy);
    return error;
  });
}

cudaError_t cudaGetSymbolSize(size_t* size, const void* symbol) {
  return with_context(__func__, [=] {
    CUdeviceptr copy = 0;
    return size == nullptr ? cudaErrorInvalidValue : runtime::locate(symbol, &copy, size);
  });
}

cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* source, size_t count, size_t offset,
                               cudaMemcpyKind kind) {
  return with_context(__func__, [=] {
    CUdeviceptr address = 0;
    const cudaError_t error = runtime::locate_range(symbol, offset, count, &address);
    if (error != cudaSuccess) return error;
    return cudaMemcpy(runtime::host_pointer(address), source, count, kind);
  });
}

cudaError_t cudaMemcpyToSymbolAsync(const void* symbol, const void* source, size_t count,
                                    size_t offset, cudaMemcpyKind kind, cudaStream_t stream) {
  return with_context(__func__, [=] {
    CUdeviceptr address = 0;
    const cudaError_t error = runtime::locate_range(symbol, offset, count, &address);
    if (error != cudaSuccess) return error;
    return cudaMemcpyAsync(runtime::host_pointer(address), source, count, kind, stream);
  });
}

cudaError_t cudaMemcpyFromSymbol(void* destination, const void* symbol, size_t count, size_t offset,
                                 cudaMemcpyKind kind) {
  return with_context(__func__, [=] {
    CUdeviceptr address = 0;
    const cudaError_t error = runtime::locate_range(symbol, offset, count, &address);
    if (error != cudaSuccess) return error;
    return cudaMemcpy(destination, runtime::host_pointer(address), count, kind);
  });
}

cudaError_t cudaMemcpyFromSymbolAsync(void* destination, const void* symbol, size_t count,
                                      size_t offset, cudaMemcpyKind kind, cudaStream_t stream) {
  return with_context(__func__, [=] {
    CUdeviceptr address = 0;
    const cudaError_t error = runtime::locate_range(symbol, offset, count, &address);
    if (error != cudaSuccess) return error;
    return cudaMemcpyAsync(destination, runtime::host_pointer(address), count, kind, stream);
  });
}

}  // extern "C"
