#include "driver/context.hpp"

#include <array>
#include <atomic>
#include <exception>
#include <memory>
#include <mutex>
#include <utility>

#include "driver/check_result.hpp"
#include "driver/device.hpp"

namespace spillover {
namespace {

CUdevice device_handle(int device) {
  require_device(device);
  CUdevice handle = 0;
  SPILLOVER_CHECKED_CALL(cuDeviceGet, &handle, device);
  return handle;
}

}  // namespace

PrimaryContext::PrimaryContext(int device) : device_(device) {
  CUcontext context = nullptr;
  SPILLOVER_CHECKED_CALL(cuDevicePrimaryCtxRetain, &context, device_handle(device));
  handle_ = context;
}

PrimaryContext::~PrimaryContext() {
  if (handle_ == nullptr) return;
  const DriverFunctions* functions = driver_functions_if_usable();
  CUdevice device = 0;
  if (functions == nullptr || functions->p_cuDeviceGet(&device, device_) != CUDA_SUCCESS) return;
  SPILLOVER_RELEASE_CALL(cuDevicePrimaryCtxRelease, device);
}

PrimaryContext::PrimaryContext(PrimaryContext&& other) noexcept
    : device_(other.device_), handle_(std::exchange(other.handle_, nullptr)) {}

PrimaryContext& PrimaryContext::operator=(PrimaryContext&& other) noexcept {
  std::swap(device_, other.device_);
  std::swap(handle_, other.handle_);
  return *this;
}

const PrimaryContext& PrimaryContext::of(int device) {
  // Leaked on purpose: see the header.
  static auto& contexts = *new std::array<std::atomic<PrimaryContext*>, kDevicesMax>{};
  static auto& mutex = *new std::mutex;
  driver_functions();  // In a forked child this throws before the lock, which may be held for ever.
  if (device >= 0 && device < kDevicesMax) {
    const auto slot = static_cast<size_t>(device);
    if (const PrimaryContext* known = contexts[slot].load(std::memory_order_acquire)) return *known;
  }
  auto made = std::make_unique<PrimaryContext>(device);  // Throws for a device that does not exist.
  const std::lock_guard lock(mutex);
  auto& slot = contexts[static_cast<size_t>(device)];
  if (slot.load(std::memory_order_relaxed) == nullptr) {
    slot.store(made.release(), std::memory_order_release);
  }
  return *slot.load(std::memory_order_relaxed);
}

ContextScope::ContextScope(int device) {
  auto* context = static_cast<CUcontext>(PrimaryContext::of(device).handle());
  CUcontext current = nullptr;
  SPILLOVER_CHECKED_CALL(cuCtxGetCurrent, &current);
  if (current == context) return;
  SPILLOVER_CHECKED_CALL(cuCtxPushCurrent, context);
  is_pushed_ = true;
}

ContextScope::~ContextScope() {
  if (!is_pushed_) return;
  CUcontext popped = nullptr;
  SPILLOVER_RELEASE_CALL(cuCtxPopCurrent, &popped);
}

ReleaseContextScope::ReleaseContextScope(int device) noexcept {
  try {
    // Known already, as the resource was made in it.
    auto* context = static_cast<CUcontext>(PrimaryContext::of(device).handle());
    const DriverFunctions& functions = driver_functions();
    CUcontext current = nullptr;
    if (functions.p_cuCtxGetCurrent(&current) == CUDA_SUCCESS && current == context) return;
    // The first attempt may return an error of earlier work.
    is_pushed_ = functions.p_cuCtxPushCurrent(context) == CUDA_SUCCESS ||
                 functions.p_cuCtxPushCurrent(context) == CUDA_SUCCESS;
  } catch (const std::exception&) {
    // The release is tried with what is current, and reports by itself if that does not do.
  }
}

ReleaseContextScope::~ReleaseContextScope() {
  if (!is_pushed_) return;
  CUcontext popped = nullptr;
  SPILLOVER_RELEASE_CALL(cuCtxPopCurrent, &popped);
}

RelaxedCaptureScope::RelaxedCaptureScope() {
  const auto exchange = driver_functions().p_cuThreadExchangeStreamCaptureMode;
  if (exchange == nullptr) return;
  CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
  if (exchange(&mode) == CUDA_SUCCESS) former_mode_ = static_cast<int>(mode);
}

RelaxedCaptureScope::~RelaxedCaptureScope() {
  if (former_mode_ < 0) return;
  auto mode = static_cast<CUstreamCaptureMode>(former_mode_);
  SPILLOVER_RELEASE_CALL(cuThreadExchangeStreamCaptureMode, &mode);
}

}  // namespace spillover
