#include "emulator/libcudart/kernels.hpp"

#include <deque>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "emulator/libcudart/builtin_kernels.hpp"
#include "emulator/libcudart/runtime.hpp"

namespace spillover::emulator::runtime {

struct Module {
  std::deque<Kernel> kernels;  // a deque, because handles point into it while it grows
  std::vector<const void*> host_stubs;
};

namespace {

struct Registry {
  std::shared_mutex mutex;
  // Guarded by mutex. torch registers tens of thousands of kernels while it is loaded.
  std::unordered_map<const void*, Kernel*> by_host_stub;
  std::unordered_set<const void*> handles;  // the kernels that were given out as cudaKernel_t
};

Registry& registry() {
  static Registry* const instance = new Registry;
  return *instance;
}

// __cudaRegisterFatBinary hands out a void**; nothing reads through it.
Module* module_of(void** handle) {
  return reinterpret_cast<Module*>(handle);
}

void remove_module(Module* module) {
  {
    Registry& all = registry();
    const std::unique_lock lock(all.mutex);
    for (const void* host_stub : module->host_stubs) all.by_host_stub.erase(host_stub);
    for (const Kernel& kernel : module->kernels) all.handles.erase(&kernel);
  }
  remove_variables(module);
  delete module;
}

void add_kernel(Module* module, const void* host_stub, const char* name) {
  Registry& all = registry();
  const std::unique_lock lock(all.mutex);
  Kernel& kernel = module->kernels.emplace_back();
  kernel.name = name;
  module->host_stubs.push_back(host_stub);
  all.by_host_stub[host_stub] = &kernel;
}

// The driver finds kernels in libraries. What a library holds makes no difference to it, so one
// with nothing in it serves all kernels; it is loaded once and never unloaded.
CUresult host_library(CUlibrary* library) {
  static const char kNoCode[] = "kernels with a body on the host";
  struct Loaded {
    CUlibrary library = nullptr;
    CUresult result = CUDA_SUCCESS;
  };
  static const Loaded loaded = [] {
    Loaded fresh;
    fresh.result =
        cuLibraryLoadData(&fresh.library, kNoCode, nullptr, nullptr, 0, nullptr, nullptr, 0);
    return fresh;
  }();
  *library = loaded.library;
  return loaded.result;
}

}  // namespace

Kernel* find_kernel(const void* function) {
  Registry& all = registry();
  const std::shared_lock lock(all.mutex);
  const auto found = all.by_host_stub.find(function);
  if (found != all.by_host_stub.end()) return found->second;
  if (all.handles.count(function) == 0) return nullptr;
  return static_cast<Kernel*>(const_cast<void*>(function));
}

CUresult driver_function(Kernel* kernel, CUfunction* function) {
  *function = kernel->function.load(std::memory_order_acquire);
  if (*function != nullptr) return CUDA_SUCCESS;
  provide_builtin(kernel->name);
  CUlibrary library = nullptr;
  CUkernel found = nullptr;
  CUresult result = host_library(&library);
  if (result == CUDA_SUCCESS) result = cuLibraryGetKernel(&found, library, kernel->name);
  if (result != CUDA_SUCCESS) return result;
  // cuLaunchKernel takes a CUkernel in place of a CUfunction.
  *function = reinterpret_cast<CUfunction>(found);
  kernel->function.store(*function, std::memory_order_release);
  return CUDA_SUCCESS;
}

}  // namespace spillover::emulator::runtime

namespace runtime = spillover::emulator::runtime;

extern "C" {

// What a compiled program calls from its static constructors and destructors.

void** __cudaRegisterFatBinary(void*) {
  return reinterpret_cast<void**>(new runtime::Module);
}

void __cudaRegisterFatBinaryEnd(void**) {}

void __cudaUnregisterFatBinary(void** handle) {
  runtime::remove_module(runtime::module_of(handle));
}

char __cudaInitModule(void**) {
  return 1;
}

void __cudaRegisterFunction(void** handle, const char* host_stub, char*, const char* name, int,
                            uint3*, uint3*, dim3*, dim3*, int*) {
  runtime::add_kernel(runtime::module_of(handle), host_stub, name);
}

void __cudaRegisterVar(void** handle, char* host_variable, char*, const char*, int, size_t size,
                       int, int) {
  runtime::add_variable(runtime::module_of(handle), host_variable, size);
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host_stub) {
  return runtime::plain(__func__, [=] {
    runtime::Kernel* const found = runtime::find_kernel(host_stub);
    if (kernel == nullptr) return cudaErrorInvalidValue;
    if (found == nullptr) return cudaErrorInvalidDeviceFunction;
    runtime::Registry& all = runtime::registry();
    const std::unique_lock lock(all.mutex);
    all.handles.insert(found);
    *kernel = reinterpret_cast<cudaKernel_t>(found);
    return cudaSuccess;
  });
}

cudaError_t cudaGetKernel(cudaKernel_t* kernel, const void* host_stub) {
  return __cudaGetKernel(kernel, host_stub);
}

}  // extern "C"
