#include <memory>
#include <utility>

#include "emulator/libcudart/runtime.hpp"

namespace runtime = spillover::emulator::runtime;
using runtime::with_context;

namespace {

static_assert(static_cast<int>(cudaStreamNonBlocking) == static_cast<int>(CU_STREAM_NON_BLOCKING));

// A runtime's stream callback takes a cudaError_t, the driver's a CUresult.
struct StreamCallback {
  cudaStreamCallback_t function;
  void* argument;
};

void run_callback(CUstream stream, CUresult status, void* argument) {
  const std::unique_ptr<StreamCallback> callback(static_cast<StreamCallback*>(argument));
  callback->function(stream, runtime::to_runtime(status), callback->argument);
}

}  // namespace

extern "C" {

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return with_context(__func__, [=] { return cuStreamCreate(stream, CU_STREAM_DEFAULT); });
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned int flags) {
  return with_context(__func__, [=] { return cuStreamCreate(stream, flags); });
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned int flags, int priority) {
  return with_context(__func__,
                      [=] { return cuStreamCreateWithPriority(stream, flags, priority); });
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  return with_context(__func__, [=] { return cuStreamDestroy(stream); });
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return with_context(__func__, [=] { return cuStreamSynchronize(stream); });
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
  return with_context(__func__, [=] { return cuStreamQuery(stream); });
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned int flags) {
  return with_context(__func__, [=] { return cuStreamWaitEvent(stream, event, flags); });
}

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  return with_context(__func__, [=] { return cuStreamGetPriority(stream, priority); });
}

cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned int* flags) {
  return with_context(__func__, [=] { return cuStreamGetFlags(stream, flags); });
}

cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  return with_context(__func__, [=] { return cuStreamGetId(stream, id); });
}

cudaError_t cudaStreamGetDevice(cudaStream_t stream, int* device) {
  return with_context(__func__, [=] {
    if (device == nullptr) return CUDA_ERROR_INVALID_VALUE;
    CUcontext context = nullptr;
    CUresult result = cuStreamGetCtx(stream, &context);
    if (result == CUDA_SUCCESS) result = cuCtxPushCurrent(context);
    if (result != CUDA_SUCCESS) return result;
    result = cuCtxGetDevice(device);
    const CUresult popped = cuCtxPopCurrent(nullptr);
    return result == CUDA_SUCCESS ? popped : result;
  });
}

cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function,
                                  void* argument, unsigned int flags) {
  return with_context(__func__, [=] {
    if (function == nullptr) return CUDA_ERROR_INVALID_VALUE;
    auto callback = std::make_unique<StreamCallback>(StreamCallback{function, argument});
    const CUresult result = cuStreamAddCallback(stream, run_callback, callback.get(), flags);
    if (result == CUDA_SUCCESS)
      static_cast<void>(callback.release());  // run_callback() owns it now
    return result;
  });
}

}  // extern "C"
