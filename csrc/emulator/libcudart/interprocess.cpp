#include <cstring>

#include "emulator/libcudart/runtime.hpp"

namespace runtime = spillover::emulator::runtime;
using runtime::with_context;

namespace {

static_assert(sizeof(cudaIpcMemHandle_t) == sizeof(CUipcMemHandle));
static_assert(sizeof(cudaIpcEventHandle_t) == sizeof(CUipcEventHandle));
static_assert(cudaIpcMemLazyEnablePeerAccess == CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);

// The runtime's handles are the driver's, under names of their own.
template <typename To, typename From>
To as(const From& from) {
  To to{};
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace

extern "C" {

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* pointer) {
  return with_context(__func__, [=] {
    if (handle == nullptr) return CUDA_ERROR_INVALID_VALUE;
    CUipcMemHandle exported{};
    const CUresult result = cuIpcGetMemHandle(&exported, runtime::device_pointer(pointer));
    if (result == CUDA_SUCCESS) *handle = as<cudaIpcMemHandle_t>(exported);
    return result;
  });
}

cudaError_t cudaIpcOpenMemHandle(void** pointer, cudaIpcMemHandle_t handle, unsigned int flags) {
  return with_context(__func__, [&] {
    if (pointer == nullptr) return CUDA_ERROR_INVALID_VALUE;
    CUdeviceptr opened = 0;
    const CUresult result = cuIpcOpenMemHandle(&opened, as<CUipcMemHandle>(handle), flags);
    if (result == CUDA_SUCCESS) *pointer = runtime::host_pointer(opened);
    return result;
  });
}

cudaError_t cudaIpcCloseMemHandle(void* pointer) {
  return with_context(__func__,
                      [=] { return cuIpcCloseMemHandle(runtime::device_pointer(pointer)); });
}

cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t* handle, cudaEvent_t event) {
  return with_context(__func__, [=] {
    if (handle == nullptr) return CUDA_ERROR_INVALID_VALUE;
    CUipcEventHandle exported{};
    const CUresult result = cuIpcGetEventHandle(&exported, event);
    if (result == CUDA_SUCCESS) *handle = as<cudaIpcEventHandle_t>(exported);
    return result;
  });
}

cudaError_t cudaIpcOpenEventHandle(cudaEvent_t* event, cudaIpcEventHandle_t handle) {
  return with_context(__func__,
                      [&] { return cuIpcOpenEventHandle(event, as<CUipcEventHandle>(handle)); });
}

}  // extern "C"
