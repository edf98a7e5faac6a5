// Modules and kernels. Images are not looked at: a kernel runs if a body was registered under its
// name (kernel_api.h), and cannot be had otherwise.
#include "emulator/core/kernels.hpp"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "emulator/libcuda/api_call.hpp"

namespace emulator = spillover::emulator;
using emulator::AccessKind;
using emulator::Address;
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

constexpr unsigned kSharedBytesMax = 232448;

// The limits that device_attributes.cpp tells. How much shared memory a kernel may have without
// asking for more (cuFuncSetAttribute) is not held against it.
bool is_launchable(const spillover_emulator_launch_shape& shape) {
  constexpr unsigned kBlockMax[3] = {1024, 1024, 64};
  constexpr unsigned kGridMax[3] = {2147483647, 65535, 65535};
  constexpr std::uint64_t kThreadsMax = 1024;
  std::uint64_t threads = 1;
  for (int axis = 0; axis < 3; ++axis) {
    if (shape.grid[axis] == 0 || shape.grid[axis] > kGridMax[axis]) return false;
    if (shape.block[axis] == 0 || shape.block[axis] > kBlockMax[axis]) return false;
    threads *= shape.block[axis];
  }
  return threads <= kThreadsMax && shape.shared_bytes <= kSharedBytesMax;
}

AccessKind kind_of(const emulator::KernelAccess& access) {
  return access.is_write ? AccessKind::kWrite : AccessKind::kRead;
}

// Whether all that a kernel says it touches is there for its device; a GPU would find out only when
// the kernel runs.
bool may_touch(Machine& machine, const emulator::Stream& stream, const RegisteredKernel& kernel,
               const std::vector<emulator::KernelAccess>& accesses) {
  return std::all_of(accesses.begin(), accesses.end(), [&](const auto& access) {
    return machine.check_usable(stream, kernel.name.c_str(), kind_of(access), access.address,
                                access.size_bytes);
  });
}

CUresult launch(const char* name, CUfunction function, const spillover_emulator_launch_shape& shape,
                CUstream handle, void** parameters, void** extra) {
  return with_work(name, handle, [&](Machine& machine, Lock& lock, const StreamRef& stream) {
    const RegisteredKernel* kernel = machine.kernels.check(function);
    if (kernel == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (extra != nullptr) return CUDA_ERROR_NOT_SUPPORTED;
    if (parameters == nullptr && !kernel->parameter_bytes.empty()) return CUDA_ERROR_INVALID_VALUE;
    if (!is_launchable(shape)) return CUDA_ERROR_INVALID_VALUE;
    std::vector<emulator::KernelAccess> touched = kernel->accesses_of(shape, parameters);
    if (!may_touch(machine, *stream, *kernel, touched)) {
      return machine.hazards.raises() ? CUDA_ERROR_UNKNOWN : CUDA_ERROR_ILLEGAL_ADDRESS;
    }
    auto launched = std::make_unique<emulator::KernelLaunch>(*kernel, shape, parameters);
    const emulator::OperationCost cost = launch_cost(machine.clock, *kernel, touched);
    if (stream->capture != nullptr) {
      emulator::KernelBody body = emulator::KernelLaunch::shared(std::move(launched));
      body.accesses = std::move(touched);
      body.cost = cost;
      machine.captures.add(stream, kernel->name.c_str(),
                           std::make_shared<const emulator::KernelBody>(std::move(body)));
      return CUDA_SUCCESS;
    }
    const emulator::Ticket ticket = machine.streams.prepare(stream);
    bool found = false;
    for (const emulator::KernelAccess& access : touched) {
      found = machine.record_access(*stream, ticket, kernel->name.c_str(), kind_of(access),
                                    access.address, access.size_bytes) ||
              found;
    }
    emulator::Kernel queued{emulator::KernelLaunch::run, launched.release(), std::move(touched),
                            emulator::KernelLaunch::drop};
    emulator::Operation operation;
    operation.body = std::move(queued);
    operation.name = kernel->name.c_str();
    operation.cost = cost;
    machine.streams.submit(lock, stream, std::move(operation));
    const CUresult hazard = machine.hazard_status(found);
    return hazard != CUDA_SUCCESS ? hazard : machine.sticky_error(stream->device);
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
    const RegisteredKernel* kernel = machine.kernels.check(function);
    if (name == nullptr || kernel == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *name = kernel->name.c_str();
    return CUDA_SUCCESS;
  });
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  return with_driver(__func__, [=](Machine& machine, Lock&) {
    const bool is_attribute = attribute >= 0 && attribute < CU_FUNC_ATTRIBUTE_MAX;
    if (value == nullptr || !is_attribute) return CUDA_ERROR_INVALID_VALUE;
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

// The settings make no difference to a body on the host; what CUDA refuses is refused.
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  return with_driver(__func__, [=](Machine& machine, Lock&) {
    if (machine.kernels.check(function) == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    switch (attribute) {
      case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
        return value >= 0 && value <= static_cast<int>(kSharedBytesMax) ? CUDA_SUCCESS
                                                                        : CUDA_ERROR_INVALID_VALUE;
      case CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT:
        return value >= -1 && value <= 100 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
      case CU_FUNC_ATTRIBUTE_REQUIRED_CLUSTER_WIDTH:
      case CU_FUNC_ATTRIBUTE_REQUIRED_CLUSTER_HEIGHT:
      case CU_FUNC_ATTRIBUTE_REQUIRED_CLUSTER_DEPTH:
      case CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED:
      case CU_FUNC_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE:
        return value >= 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
      default:
        return CUDA_ERROR_INVALID_VALUE;  // the others can only be read
    }
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
