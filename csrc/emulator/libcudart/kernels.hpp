// Kernels and __device__ variables that host programs registered with the runtime. A program's
// static constructors register them when its libraries are loaded, before main() and before CUDA is
// used.
//
// The driver cannot run a GPU's machine code; it runs the kernels that have a body on the host
// (core/kernel_api.h), by name. The runtime's part is to know which name a launch means.
//
// One registry a process, never destroyed: libraries unregister in their static destructors, which
// may run after ours. Every function may be called from any thread.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstddef>

namespace spillover::emulator::runtime {

// A __global__ function; a cudaKernel_t is a pointer to one. It lives as long as the library that
// registered it.
struct Kernel {
  const char* name = nullptr;                 // mangled; owned by the library
  std::atomic<CUfunction> function{nullptr};  // the driver's, once it is known
};

// The kernel behind a host stub or a cudaKernel_t, nullptr where there is none.
Kernel* find_kernel(const void* function);

// The driver's function for a kernel; CUDA_ERROR_NO_BINARY_FOR_GPU where it has no body, which the
// driver reports on stderr.
CUresult driver_function(Kernel* kernel, CUfunction* function);

// Forgets the copies of __device__ variables on a device, whose memory goes away with its context.
void forget_device_variables(int device) noexcept;

// One library's __cudaRegisterFatBinary.
struct Module;
void add_variable(Module* module, const void* host_variable, size_t size_bytes);
void remove_variables(const Module* module);

}  // namespace spillover::emulator::runtime
