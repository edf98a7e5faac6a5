// Events.
#include "emulator/core/events.hpp"

#include "emulator/libcuda/api_call.hpp"

namespace emulator = spillover::emulator;
using emulator::Context;
using emulator::Event;
using emulator::Lock;
using emulator::Machine;
using emulator::StreamRef;
using emulator::with_context;
using emulator::with_driver;
using emulator::with_work;

namespace {

// A function of one event: body(Machine&, Lock&, Event&) -> CUresult.
template <typename Body>
CUresult with_event(const char* name, CUevent handle, Body&& body) {
  return with_driver(name, [&](Machine& machine, Lock& lock) {
    Event* event = machine.events.find(handle);
    if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    const CUresult sticky = machine.sticky_error(event->context->device);
    if (sticky != CUDA_SUCCESS) return sticky;
    return body(machine, lock, *event);
  });
}

CUresult record(const char* name, CUevent handle, CUstream stream_handle, unsigned flags) {
  return with_work(name, stream_handle, [=](Machine& machine, Lock& lock, const StreamRef& stream) {
    Event* event = machine.events.find(handle);
    if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    return stream->capture != nullptr ? machine.captures.record(stream, handle, event, flags)
                                      : machine.events.record(lock, event, stream);
  });
}

}  // namespace

extern "C" {

CUresult cuEventCreate(CUevent* handle, unsigned int flags) {
  return with_context(__func__, [=](Machine& machine, Lock&, Context& context) {
    constexpr unsigned kKnown =
        CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING | CU_EVENT_INTERPROCESS;
    if (handle == nullptr || (flags & ~kKnown) != 0) return CUDA_ERROR_INVALID_VALUE;
    const bool is_interprocess = (flags & CU_EVENT_INTERPROCESS) != 0;
    if (is_interprocess && (flags & CU_EVENT_DISABLE_TIMING) == 0) return CUDA_ERROR_INVALID_VALUE;
    const CUevent created = machine.events.create(&context, flags);
    if (created == nullptr) return CUDA_ERROR_OUT_OF_MEMORY;
    *handle = created;
    return CUDA_SUCCESS;
  });
}

CUresult cuEventDestroy(CUevent handle) {
  return with_driver(__func__, [=](Machine& machine, Lock&) {
    if (machine.events.find(handle) == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    machine.events.destroy(handle);
    return CUDA_SUCCESS;
  });
}

CUresult cuEventRecord(CUevent handle, CUstream stream) {
  return record(__func__, handle, stream, 0);
}

CUresult cuEventRecordWithFlags(CUevent handle, CUstream stream, unsigned int flags) {
  if ((flags & ~unsigned{CU_EVENT_RECORD_EXTERNAL}) != 0) {
    return emulator::finish_call(__func__, CUDA_ERROR_INVALID_VALUE);
  }
  return record(__func__, handle, stream, flags);
}

CUresult cuEventQuery(CUevent handle) {
  return with_event(__func__, handle, [=](Machine& machine, Lock& lock, const Event& event) {
    const int device = event.context->device;
    const CUresult admitted = machine.captures.admit_event_wait(event);
    if (admitted != CUDA_SUCCESS) return admitted;
    const CUresult result = machine.events.query(lock, handle);
    const CUresult sticky = machine.sticky_error(device);
    return sticky != CUDA_SUCCESS ? sticky : result;
  });
}

CUresult cuEventSynchronize(CUevent handle) {
  return with_event(__func__, handle, [](Machine& machine, Lock& lock, Event& event) {
    const int device = event.context->device;
    const CUresult admitted = machine.captures.admit_event_wait(event);
    if (admitted != CUDA_SUCCESS) return admitted;
    machine.events.synchronize(lock, &event);
    return machine.sticky_error(device);
  });
}

CUresult cuEventElapsedTime(float* milliseconds, CUevent start_handle, CUevent end_handle) {
  return with_event(__func__, start_handle, [=](Machine& machine, Lock&, const Event& start) {
    const Event* end = machine.events.find(end_handle);
    if (end == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if (milliseconds == nullptr) return CUDA_ERROR_INVALID_VALUE;
    if (start.capture != nullptr || end->capture != nullptr) return CUDA_ERROR_CAPTURED_EVENT;
    return emulator::Events::elapsed(start, *end, milliseconds);
  });
}

}  // extern "C"
