#include "driver/event.hpp"

#include <exception>
#include <utility>

#include "driver/check_result.hpp"
#include "driver/context.hpp"

namespace spillover {
namespace {

CUevent raw(EventHandle event) {
  return static_cast<CUevent>(event);
}

RecordOutcome outcome_of(CUresult result) {
  if (result == CUDA_ERROR_STREAM_CAPTURE_IMPLICIT) return RecordOutcome::kStreamCapturing;
  return result == CUDA_SUCCESS ? RecordOutcome::kRecorded : RecordOutcome::kFailed;
}

// Submits to a stream that is alive, unless it is capturing.
template <class Submit>
RecordOutcome try_submit(int device, CUstream stream, Submit submit) noexcept {
  try {
    const ContextScope scope(device);
    const DriverFunctions& functions = driver_functions();
    // Asked of the legacy stream too, which cannot capture: work there while a blocking stream does
    // would end that capture, and the question would not.
    if (functions.p_cuStreamIsCapturing != nullptr) {
      CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
      const CUresult result = functions.p_cuStreamIsCapturing(stream, &status);
      if (result != CUDA_SUCCESS) return outcome_of(result);
      if (status != CU_STREAM_CAPTURE_STATUS_NONE) return RecordOutcome::kStreamCapturing;
    }
    return outcome_of(submit());
  } catch (const std::exception&) {
    // No context or no driver: the caller takes it as not done and tries again.
    return RecordOutcome::kFailed;
  }
}

}  // namespace

Event::Event(int device, EventWait wait) : device_(device) {
  const ContextScope scope(device);
  CUevent event = nullptr;
  const unsigned flags =
      CU_EVENT_DISABLE_TIMING | (wait == EventWait::kSleep ? CU_EVENT_BLOCKING_SYNC : 0U);
  SPILLOVER_CHECKED_CALL(cuEventCreate, &event, flags);
  handle_ = event;
}

Event::~Event() {
  if (handle_ != nullptr) SPILLOVER_RELEASE_CALL(cuEventDestroy, raw(handle_));
}

Event::Event(Event&& other) noexcept
    : device_(other.device_), handle_(std::exchange(other.handle_, nullptr)) {}

Event& Event::operator=(Event&& other) noexcept {
  std::swap(device_, other.device_);
  std::swap(handle_, other.handle_);
  return *this;
}

void Event::record(StreamHandle stream) {
  const ContextScope scope(device_);
  SPILLOVER_CHECKED_CALL(cuEventRecord, raw(handle_), static_cast<CUstream>(stream));
}

RecordOutcome Event::try_record(StreamHandle stream) noexcept {
  auto* raw_stream = static_cast<CUstream>(stream);
  return try_submit(device_, raw_stream,
                    [&] { return SPILLOVER_DRIVER_CALL(cuEventRecord, raw(handle_), raw_stream); });
}

RecordOutcome Event::try_put_before(StreamHandle stream) const noexcept {
  auto* raw_stream = static_cast<CUstream>(stream);
  return try_submit(device_, raw_stream, [&] {
    return SPILLOVER_DRIVER_CALL(cuStreamWaitEvent, raw_stream, raw(handle_), 0);
  });
}

void Event::put_before(StreamHandle stream) const {
  const ContextScope scope(device_);
  SPILLOVER_CHECKED_CALL(cuStreamWaitEvent, static_cast<CUstream>(stream), raw(handle_), 0);
}

bool Event::is_complete() const {
  const ContextScope scope(device_);
  const CUresult result = SPILLOVER_DRIVER_CALL(cuEventQuery, raw(handle_));
  if (result == CUDA_ERROR_NOT_READY) return false;
  check(result, "cuEventQuery");
  return true;
}

void Event::synchronize() const {
  const ContextScope scope(device_);
  SPILLOVER_CHECKED_CALL(cuEventSynchronize, raw(handle_));
}

void synchronize_event(int device, EventHandle event) {
  const ContextScope scope(device);
  SPILLOVER_CHECKED_CALL(cuEventSynchronize, raw(event));
}

}  // namespace spillover
