#include "driver/stream.hpp"

#include <utility>

#include "driver/check_result.hpp"
#include "driver/context.hpp"
#include "driver/event.hpp"

namespace spillover {
namespace {

CUstream raw(StreamHandle stream) {
  return static_cast<CUstream>(stream);
}

}  // namespace

Stream::Stream(int device, int priority) : device_(device) {
  const ContextScope scope(device);
  CUstream stream = nullptr;
  SPILLOVER_CHECKED_CALL(cuStreamCreateWithPriority, &stream, CU_STREAM_NON_BLOCKING, priority);
  handle_ = stream;
}

Stream::~Stream() {
  if (handle_ != nullptr) SPILLOVER_RELEASE_CALL(cuStreamDestroy, raw(handle_));
}

Stream::Stream(Stream&& other) noexcept
    : device_(other.device_), handle_(std::exchange(other.handle_, nullptr)) {}

Stream& Stream::operator=(Stream&& other) noexcept {
  std::swap(device_, other.device_);
  std::swap(handle_, other.handle_);
  return *this;
}

void Stream::synchronize() const {
  const ContextScope scope(device_);
  SPILLOVER_CHECKED_CALL(cuStreamSynchronize, raw(handle_));
}

void Stream::settle() const noexcept {
  const DriverFunctions* functions = driver_functions_if_usable();
  if (functions == nullptr) return;
  const ReleaseContextScope scope(device_);
  if (functions->p_cuStreamSynchronize(raw(handle_)) == CUDA_SUCCESS) return;
  report_failure(functions->p_cuStreamSynchronize(raw(handle_)), "cuStreamSynchronize");
}

bool Stream::is_idle() const {
  const ContextScope scope(device_);
  const CUresult result = SPILLOVER_DRIVER_CALL(cuStreamQuery, raw(handle_));
  if (result == CUDA_ERROR_NOT_READY) return false;
  check(result, "cuStreamQuery");
  return true;
}

void Stream::wait(const Event& event) const {
  const ContextScope scope(device_);
  SPILLOVER_CHECKED_CALL(cuStreamWaitEvent, raw(handle_), static_cast<CUevent>(event.handle()), 0);
}

StreamHandle normalize_stream(StreamHandle stream) noexcept {
  return raw(stream) == CU_STREAM_LEGACY ? nullptr : stream;
}

bool is_per_thread_stream(StreamHandle stream) noexcept {
  return raw(stream) == CU_STREAM_PER_THREAD;
}

uint64_t stream_identity(StreamHandle stream) {
  const auto get_id = driver_functions().p_cuStreamGetId;
  if (get_id == nullptr) return 0;
  unsigned long long identity = 0;
  check(get_id(raw(stream), &identity), "cuStreamGetId");
  return identity;
}

int stream_device(StreamHandle stream) {
  CUdevice device = 0;  // The driver numbers devices as it counts them.
  if (const auto get_device = driver_functions().p_cuStreamGetDevice; get_device != nullptr) {
    check(get_device(raw(stream), &device), "cuStreamGetDevice");
    return device;
  }
  CUcontext context = nullptr;
  SPILLOVER_CHECKED_CALL(cuStreamGetCtx, raw(stream), &context);
  SPILLOVER_CHECKED_CALL(cuCtxPushCurrent, context);
  const CUresult result = SPILLOVER_DRIVER_CALL(cuCtxGetDevice, &device);
  SPILLOVER_RELEASE_CALL(cuCtxPopCurrent, &context);
  check(result, "cuCtxGetDevice");
  return device;
}

bool stream_is_capturing(StreamHandle stream) {
  CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
  const CUresult result = SPILLOVER_DRIVER_CALL(cuStreamIsCapturing, raw(stream), &status);
  // The legacy stream cannot capture; this is the answer while another, blocking stream does.
  if (result == CUDA_ERROR_STREAM_CAPTURE_IMPLICIT) return false;
  check(result, "cuStreamIsCapturing");
  return status != CU_STREAM_CAPTURE_STATUS_NONE;
}

StreamActivity stream_activity(int device, StreamHandle stream) {
  const ContextScope scope(device);
  CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
  CUresult result = SPILLOVER_DRIVER_CALL(cuStreamIsCapturing, raw(stream), &status);
  // For the legacy stream: a blocking stream captures, and a query would end that capture.
  if (result == CUDA_ERROR_STREAM_CAPTURE_IMPLICIT) return StreamActivity::kBusy;
  check(result, "cuStreamIsCapturing");
  if (status != CU_STREAM_CAPTURE_STATUS_NONE) return StreamActivity::kBusy;
  result = SPILLOVER_DRIVER_CALL(cuStreamQuery, raw(stream));
  if (result == CUDA_ERROR_NOT_READY) return StreamActivity::kBusy;
  check(result, "cuStreamQuery");
  return StreamActivity::kIdle;
}

}  // namespace spillover
