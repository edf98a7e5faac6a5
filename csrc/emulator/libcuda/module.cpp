// Modules and kernels. Images are not looked at: a kernel runs if a body was registered under its
// name (kernel_api.h), and cannot be had otherwise.
#include "emulator/core/kernels.hpp"

#include <memory>
#include <utility>

#include "emulator/libcuda/api_call.hpp"

namespace emulator = spillover::emulator;
using emulator::Lock;
using emulator::Machine;
using emulator::RegisteredKernel;
using emulator::StreamRef;
using emulator::with_driver;
using emulator::with_work;

namespace {

CUresult load(const char* name, void** handle, const void* image) {
  return with_driver(name, [=](Machine& machine, Lock&) {
    if (handle == nullptr || image == nullptr) return CUDA_ERROR_INVALID_VALUE;
    machine.modules.insert(emulator::Module{}, handle);
    return CUDA_SUCCESS;
  });
}

CUresult unload(const char* name, void* handle) {
  return with_driver(name, [=](Machine& machine, Lock&) {
    if (machine.modules.find(handle) == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    machine.modules.erase(handle);
    return CUDA_SUCCESS;
  });
}

CUresult get_function(const char* name, void** function, void* module, const char* kernel) {
  return with_driver(name, [=](Machine& machine, Lock&) {
    if (function == nullptr || kernel == nullptr) return CUDA_ERROR_INVALID_VALUE;
    if (machine.modules.find(module) == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    RegisteredKernel* found = machine.kernels.find(kernel);
    if (found == nullptr) return CUDA_ERROR_NO_BINARY_FOR_GPU;
    *function = found;
    return CUDA_SUCCESS;
  });
}

CUresult launch(const char* name, CUfunction function, const spillover_emulator_launch_shape& shape,
                CUstream handle, void** parameters, void** extra) {
  return with_work(name, handle, [&](Machine& machine, Lock& lock, const StreamRef& stream) {
    const RegisteredKernel* kernel = machine.kernels.check(function);
    if (kernel == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (extra != nullptr) return CUDA_ERROR_NOT_SUPPORTED;
    if (parameters == nullptr && !kernel->parameter_bytes.empty()) return CUDA_ERROR_INVALID_VALUE;
    for (int axis = 0; axis < 3; ++axis) {
      if (shape.grid[axis] == 0 || shape.block[axis] == 0) return CUDA_ERROR_INVALID_VALUE;
    }
    auto launched = std::make_unique<emulator::KernelLaunch>(*kernel, shape, parameters);
    if (stream->capture != nullptr) {
      machine.captures.add(stream, kernel->name.c_str(),
                           std::make_shared<const emulator::KernelBody>(
                               emulator::KernelLaunch::shared(std::move(launched))));
      return CUDA_SUCCESS;
    }
    machine.streams.prepare(stream);
    emulator::Operation operation;
    operation.body = emulator::Kernel{emulator::KernelLaunch::run, launched.release()};
    operation.name = kernel->name.c_str();
    machine.streams.submit(lock, stream, std::move(operation));
    return machine.sticky_error(stream->device);
  });
}

}  // namespace

extern "C" {

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  return load(__func__, reinterpret_cast<void**>(module), image);
}

CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned int, CUjit_option*,
                            void**) {
  return load(__func__, reinterpret_cast<void**>(module), image);
}

CUresult cuModuleLoadFatBinary(CUmodule* module, const void* image) {
  return load(__func__, reinterpret_cast<void**>(module), image);
}

CUresult cuModuleUnload(CUmodule module) {
  return unload(__func__, module);
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  return get_function(__func__, reinterpret_cast<void**>(function), module, name);
}

CUresult cuModuleGetLoadingMode(CUmoduleLoadingMode* mode) {
  return with_driver(__func__, [=](Machine&, Lock&) {
    if (mode == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *mode = CU_MODULE_LAZY_LOADING;
    return CUDA_SUCCESS;
  });
}

CUresult cuLibraryLoadData(CUlibrary* library, const void* image, CUjit_option*, void**,
                           unsigned int, CUlibraryOption*, void**, unsigned int) {
  return load(__func__, reinterpret_cast<void**>(library), image);
}

CUresult cuLibraryUnload(CUlibrary library) {
  return unload(__func__, library);
}

CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char* name) {
  return get_function(__func__, reinterpret_cast<void**>(kernel), library, name);
}

CUresult cuKernelGetFunction(CUfunction* function, CUkernel kernel) {
  return with_driver(__func__, [=](Machine& machine, Lock&) {
    if (function == nullptr) return CUDA_ERROR_INVALID_VALUE;
    if (machine.kernels.check(kernel) == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    *function = reinterpret_cast<CUfunction>(kernel);
    return CUDA_SUCCESS;
  });
}

CUresult cuFuncGetName(const char** name, CUfunction function) {
  return with_driver(__func__, [=](Machine& machine, Lock&) {
    if (name == nullptr) return CUDA_ERROR_INVALID_VALUE;
    const RegisteredKernel* kernel = machine.kernels.check(function);
    if (kernel == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    *name = kernel->name.c_str();
    return CUDA_SUCCESS;
  });
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  return with_driver(__func__, [=](Machine& machine, Lock&) {
    if (value == nullptr) return CUDA_ERROR_INVALID_VALUE;
    if (machine.kernels.check(function) == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    // A body on the host has no registers and no shared memory of its own.
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
             : attribute == CU_FUNC_ATTRIBUTE_PTX_VERSION ||
                     attribute == CU_FUNC_ATTRIBUTE_BINARY_VERSION
                 ? 90
                 : 0;
    return CUDA_SUCCESS;
  });
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute, int) {
  return with_driver(__func__, [=](Machine& machine, Lock&) {
    return machine.kernels.check(function) == nullptr ? CUDA_ERROR_INVALID_HANDLE : CUDA_SUCCESS;
  });
}

CUresult cuLaunchKernel(CUfunction function, unsigned int grid_x, unsigned int grid_y,
                        unsigned int grid_z, unsigned int block_x, unsigned int block_y,
                        unsigned int block_z, unsigned int shared_bytes, CUstream stream,
                        void** parameters, void** extra) {
  return launch(__func__, function,
                {{grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared_bytes}, stream,
                parameters, extra);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters,
                          void** extra) {
  if (config == nullptr) return emulator::finish_call(__func__, CUDA_ERROR_INVALID_VALUE);
  return launch(__func__, function,
                {{config->gridDimX, config->gridDimY, config->gridDimZ},
                 {config->blockDimX, config->blockDimY, config->blockDimZ},
                 config->sharedMemBytes},
                config->hStream, parameters, extra);
}

}  // extern "C"
