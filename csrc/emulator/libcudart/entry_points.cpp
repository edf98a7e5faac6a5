#include "emulator/libcudart/runtime.hpp"

namespace runtime = spillover::emulator::runtime;
using runtime::plain;
using runtime::with_driver;

namespace {

// Looks a driver function up by its unsuffixed name, as cuGetProcAddress does: version picks
// cuMemAlloc_v2 rather than the first cuMemAlloc. A name that is not there is an answer, not an
// error.
cudaError_t find_entry_point(const char* symbol, void** function, unsigned int version,
                             unsigned long long flags, cudaDriverEntryPointQueryResult* answer) {
  if (symbol == nullptr || function == nullptr) return cudaErrorInvalidValue;
  *function = nullptr;
  CUdriverProcAddressQueryResult found = CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  const CUresult result =
      cuGetProcAddress(symbol, function, static_cast<int>(version), flags, &found);
  if (result == CUDA_SUCCESS && answer != nullptr) {
    *answer = static_cast<cudaDriverEntryPointQueryResult>(found);
  }
  return runtime::to_runtime(result);
}

}  // namespace

extern "C" {

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function,
                                             unsigned int version, unsigned long long flags,
                                             cudaDriverEntryPointQueryResult* answer) {
  return with_driver(__func__,
                     [=] { return find_entry_point(symbol, function, version, flags, answer); });
}

// Left out of CUDA 13's headers, but still exported by its runtime.
cudaError_t cudaGetDriverEntryPoint(const char* symbol, void** function, unsigned long long flags,
                                    cudaDriverEntryPointQueryResult* answer) {
  return with_driver(
      __func__, [=] { return find_entry_point(symbol, function, CUDART_VERSION, flags, answer); });
}

// There is nothing to profile.
cudaError_t cudaProfilerStart() {
  return plain(__func__, [] { return cudaSuccess; });
}

cudaError_t cudaProfilerStop() {
  return plain(__func__, [] { return cudaSuccess; });
}

}  // extern "C"
