// Inside of the emulated libcudart: the one way in and out of every entry point, and what the entry
// points share. The runtime is a thin layer over the public driver API; it keeps the last error and
// the chosen device of each thread, and the registered kernels and variables (kernel_registry.hpp).
//
// Everything here may be called from any thread.
//
// Note [One seam]: each exported function is one call of plain(), with_driver() or with_context(),
// so that last errors, forks, lazy contexts and injected faults are handled in one place.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <utility>

namespace spillover::emulator::runtime {

// What has to be there before an entry point's body may run.
enum class Requirement {
  kNothing,
  kDriver,   // the driver is initialised
  kContext,  // and the thread has a current context; the chosen device's primary one by default
};

// The runtime's codes are the driver's, under names of their own.
inline cudaError_t to_runtime(CUresult result) {
  return static_cast<cudaError_t>(result);
}
inline cudaError_t to_runtime(cudaError_t error) {
  return error;
}

// One call of an entry point. Makes what the call requires, and records its outcome as the thread's
// last error.
class ApiCall {
 public:
  ApiCall(const char* name, Requirement requirement) noexcept;
  ApiCall(const ApiCall&) = delete;
  ApiCall& operator=(const ApiCall&) = delete;

  cudaError_t status() const noexcept { return status_; }
  cudaError_t finish(cudaError_t outcome) noexcept;

 private:
  const char* name_;
  int late_error_ = 0;  // to be returned in place of success
  cudaError_t status_;
};

template <typename Body>
cudaError_t guarded(const char* name, Requirement requirement, Body&& body) noexcept {
  ApiCall call(name, requirement);
  if (call.status() != cudaSuccess) return call.finish(call.status());
  return call.finish(to_runtime(std::forward<Body>(body)()));
}

template <typename Body>
cudaError_t plain(const char* name, Body&& body) noexcept {
  return guarded(name, Requirement::kNothing, std::forward<Body>(body));
}

template <typename Body>
cudaError_t with_driver(const char* name, Body&& body) noexcept {
  return guarded(name, Requirement::kDriver, std::forward<Body>(body));
}

template <typename Body>
cudaError_t with_context(const char* name, Body&& body) noexcept {
  return guarded(name, Requirement::kContext, std::forward<Body>(body));
}

// Device of the thread's current context, or the one that its first call will use.
CUresult current_device(CUdevice* device) noexcept;

// Makes device's primary context current on this thread.
CUresult use_device(CUdevice device) noexcept;

// The primary context of a device, which is created at first use and lives until the process ends.
CUresult primary_context(CUdevice device, CUcontext* context) noexcept;

// Destroys all that a device's primary context holds; the next call of this thread makes a new one.
CUresult reset_device(CUdevice device) noexcept;

// A driver attribute of a device, 0 where the driver does not know it.
int attribute_of(CUdevice device, CUdevice_attribute attribute) noexcept;

// Writes "spillover emulator: <message>" and a newline to stderr in one piece.
void report(const char* format, ...) noexcept __attribute__((format(printf, 1, 2)));

inline CUdeviceptr device_pointer(const void* pointer) {
  return reinterpret_cast<CUdeviceptr>(pointer);
}

inline void* host_pointer(CUdeviceptr pointer) {
  return reinterpret_cast<void*>(pointer);
}

// cudaStreamPerThread in place of the null stream, for entry points that were compiled for
// per-thread default streams.
inline cudaStream_t per_thread(cudaStream_t stream) {
  return stream == nullptr ? cudaStreamPerThread : stream;
}

}  // namespace spillover::emulator::runtime
