#include <cstddef>
#include <vector>

#include "emulator/libcudart/kernels.hpp"
#include "emulator/libcudart/runtime.hpp"

namespace runtime = spillover::emulator::runtime;
using runtime::attribute_of;
using runtime::with_context;

namespace {

bool fits(dim3 grid, dim3 block, CUdevice device) {
  const auto within = [=](unsigned long long value, CUdevice_attribute limit) {
    return value != 0 && value <= static_cast<unsigned long long>(attribute_of(device, limit));
  };
  const unsigned long long threads = static_cast<unsigned long long>(block.x) * block.y * block.z;
  return within(threads, CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK) &&
         within(block.x, CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X) &&
         within(block.y, CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y) &&
         within(block.z, CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z) &&
         within(grid.x, CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X) &&
         within(grid.y, CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y) &&
         within(grid.z, CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z);
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** arguments,
                   size_t shared_bytes, cudaStream_t stream) {
  runtime::Kernel* const kernel = runtime::find_kernel(function);
  if (kernel == nullptr) return cudaErrorInvalidDeviceFunction;
  CUdevice device = 0;
  CUresult result = runtime::current_device(&device);
  if (result != CUDA_SUCCESS) return runtime::to_runtime(result);
  if (!fits(grid, block, device)) return cudaErrorInvalidConfiguration;
  CUfunction code = nullptr;
  result = runtime::driver_function(kernel, &code);
  if (result == CUDA_SUCCESS) {
    result = cuLaunchKernel(code, grid.x, grid.y, grid.z, block.x, block.y, block.z,
                            static_cast<unsigned int>(shared_bytes), stream, arguments, nullptr);
  }
  return runtime::to_runtime(result);
}

struct CallConfiguration {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
  cudaStream_t stream = nullptr;
};

// kernel<<<...>>>() pushes its configuration, evaluates its arguments, which may launch kernels
// themselves, and pops it in the host stub.
thread_local std::vector<CallConfiguration> call_configurations;

}  // namespace

extern "C" {

unsigned int __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes,
                                         cudaStream_t stream) {
  call_configurations.push_back({grid, block, shared_bytes, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes,
                                       void* stream) {
  return runtime::plain(__func__, [=] {
    if (call_configurations.empty()) return cudaErrorMissingConfiguration;
    const CallConfiguration& top = call_configurations.back();
    *grid = top.grid;
    *block = top.block;
    *shared_bytes = top.shared_bytes;
    *static_cast<cudaStream_t*>(stream) = top.stream;
    call_configurations.pop_back();
    return cudaSuccess;
  });
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared_bytes, cudaStream_t stream) {
  return with_context(__func__,
                      [=] { return launch(kernel, grid, block, arguments, shared_bytes, stream); });
}

cudaError_t __cudaLaunchKernel_ptsz(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                                    size_t shared_bytes, cudaStream_t stream) {
  return with_context(__func__, [=] {
    return launch(kernel, grid, block, arguments, shared_bytes, runtime::per_thread(stream));
  });
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t stream) {
  return with_context(
      __func__, [=] { return launch(function, grid, block, arguments, shared_bytes, stream); });
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* configuration, const void* function,
                                void** arguments) {
  return with_context(__func__, [=] {
    if (configuration == nullptr) return cudaErrorInvalidValue;
    return launch(function, configuration->gridDim, configuration->blockDim, arguments,
                  configuration->dynamicSmemBytes, configuration->stream);
  });
}

// A body does the whole grid's work, so a cooperative launch is a launch.
cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block,
                                        void** arguments, size_t shared_bytes,
                                        cudaStream_t stream) {
  return with_context(
      __func__, [=] { return launch(function, grid, block, arguments, shared_bytes, stream); });
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* argument) {
  return with_context(__func__, [=] { return cuLaunchHostFunc(stream, function, argument); });
}

}  // extern "C"
