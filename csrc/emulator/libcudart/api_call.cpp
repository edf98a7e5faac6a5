#include <array>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "emulator/core/fault_api.h"
#include "emulator/libcudart/runtime.hpp"

namespace spillover::emulator::runtime {
namespace {

thread_local cudaError_t last_error = cudaSuccess;
thread_local CUdevice chosen_device = 0;

// An error after which CUDA refuses further work until the process ends or the device is reset.
std::atomic<cudaError_t> sticky_error{cudaSuccess};

std::atomic<bool> driver_initialised{false};

constexpr int kDevicesMax = 64;
std::array<std::atomic<CUcontext>, kDevicesMax> primary_contexts{};

bool is_sticky(cudaError_t error) {
  switch (error) {
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorAssert:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
      return true;
    default:
      return false;
  }
}

bool is_verbose() {
  static const bool verbose = [] {
    const char* value = std::getenv("SPILLOVER_EMULATOR_VERBOSE");
    return value != nullptr && value[0] != '\0' && std::strcmp(value, "0") != 0;
  }();
  return verbose;
}

// A child that was forked after this does not initialise again: every driver call then fails with
// CUDA_ERROR_NOT_INITIALIZED, as a context does not survive fork().
CUresult initialise_driver() {
  if (driver_initialised.load(std::memory_order_acquire)) return CUDA_SUCCESS;
  const CUresult result = cuInit(0);
  if (result == CUDA_SUCCESS) driver_initialised.store(true, std::memory_order_release);
  return result;
}

CUresult ensure_context() {
  CUcontext context = nullptr;
  const CUresult result = cuCtxGetCurrent(&context);
  if (result != CUDA_SUCCESS || context != nullptr) return result;
  return use_device(chosen_device);
}

CUresult prepare(Requirement requirement) {
  if (requirement == Requirement::kNothing) return CUDA_SUCCESS;
  const CUresult result = initialise_driver();
  if (result != CUDA_SUCCESS || requirement == Requirement::kDriver) return result;
  return ensure_context();
}

}  // namespace

ApiCall::ApiCall(const char* name, Requirement requirement) noexcept
    : name_(name), status_(cudaSuccess) {
  if (__atomic_load_n(&spillover_emulator_observes_calls, __ATOMIC_RELAXED) != 0) {
    status_ = static_cast<cudaError_t>(spillover_emulator_observe_call(name, &late_error_));
  }
  if (status_ == cudaSuccess) status_ = to_runtime(prepare(requirement));
}

cudaError_t ApiCall::finish(cudaError_t outcome) noexcept {
  if (outcome == cudaSuccess) outcome = static_cast<cudaError_t>(late_error_);
  if (outcome == cudaSuccess) return outcome;
  if (is_sticky(outcome) && spillover_emulator_device_is_broken() != 0) sticky_error.store(outcome);
  last_error = outcome;
  if (outcome != cudaErrorNotReady && is_verbose()) {
    report("%s: %s", name_, cudaGetErrorName(outcome));
  }
  return outcome;
}

CUresult current_device(CUdevice* device) noexcept {
  const CUresult result = cuCtxGetDevice(device);
  if (result != CUDA_ERROR_INVALID_CONTEXT) return result;
  *device = chosen_device;
  return CUDA_SUCCESS;
}

CUresult primary_context(CUdevice device, CUcontext* context) noexcept {
  if (device < 0 || device >= kDevicesMax) return CUDA_ERROR_INVALID_DEVICE;
  std::atomic<CUcontext>& slot = primary_contexts[static_cast<size_t>(device)];
  *context = slot.load(std::memory_order_acquire);
  if (*context != nullptr) return CUDA_SUCCESS;
  // Two threads may both retain it here; one retain too many keeps the context as alive as one
  // does.
  const CUresult result = cuDevicePrimaryCtxRetain(context, device);
  if (result == CUDA_SUCCESS) slot.store(*context, std::memory_order_release);
  return result;
}

CUresult use_device(CUdevice device) noexcept {
  CUcontext context = nullptr;
  CUresult result = primary_context(device, &context);
  if (result == CUDA_SUCCESS) result = cuCtxSetCurrent(context);
  if (result == CUDA_SUCCESS) chosen_device = device;
  return result;
}

CUresult reset_device(CUdevice device) noexcept {
  if (device < 0 || device >= kDevicesMax) return CUDA_ERROR_INVALID_DEVICE;
  CUresult result = cuDevicePrimaryCtxReset(device);
  if (result != CUDA_SUCCESS) return result;
  primary_contexts[static_cast<size_t>(device)].store(nullptr);
  result = cuCtxSetCurrent(nullptr);
  chosen_device = device;
  sticky_error.store(cudaSuccess);
  last_error = cudaSuccess;
  return result;
}

int attribute_of(CUdevice device, CUdevice_attribute attribute) noexcept {
  int value = 0;
  return cuDeviceGetAttribute(&value, attribute, device) == CUDA_SUCCESS ? value : 0;
}

void report(const char* format, ...) noexcept {
  std::array<char, 1024> message{};
  std::va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message.data(), message.size(), format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "spillover emulator: %s\n", message.data());
}

}  // namespace spillover::emulator::runtime

namespace runtime = spillover::emulator::runtime;

extern "C" {

cudaError_t cudaGetLastError() {
  const cudaError_t error = cudaPeekAtLastError();
  runtime::last_error = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() {
  const cudaError_t sticky = runtime::sticky_error.load(std::memory_order_relaxed);
  return sticky != cudaSuccess ? sticky : runtime::last_error;
}

// Called by the generated stubs (generate_stubs.cmake), whose symbols are weak so that a definition
// in this library takes their place.
cudaError_t spillover_emulator_runtime_not_emulated(const char* name, const char* reason,
                                                    int* reported) {
  return runtime::plain(name, [=] {
    if (__atomic_exchange_n(reported, 1, __ATOMIC_RELAXED) == 0) {
      runtime::report("%s is not emulated%s%s", name, reason[0] == '\0' ? "" : ": ", reason);
    }
    return cudaErrorNotSupported;
  });
}

}  // extern "C"
