// Streams, host functions, and values in memory that streams write and wait for.
#include <memory>
#include <utility>

#include "emulator/libcuda/api_call.hpp"

namespace emulator = spillover::emulator;
using emulator::Address;
using emulator::Context;
using emulator::Lock;
using emulator::Machine;
using emulator::Operation;
using emulator::StreamRef;
using emulator::with_context;
using emulator::with_driver;
using emulator::with_stream;

namespace {

constexpr int kPriorityGreatest = -5;

thread_local CUstreamCaptureMode capture_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;

CUresult create(const char* name, CUstream* handle, unsigned flags, int priority) {
  return with_context(name, [=](Machine& machine, Lock&, Context& context) {
    if (handle == nullptr || (flags & ~unsigned{CU_STREAM_NON_BLOCKING}) != 0) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    // Priorities outside the range are clamped to it.
    const int clamped = priority > 0                   ? 0
                        : priority < kPriorityGreatest ? kPriorityGreatest
                                                       : priority;
    *handle = machine.streams.create(&context, flags, clamped)->handle;
    return CUDA_SUCCESS;
  });
}

void launch(Machine& machine, Lock& lock, const StreamRef& stream, Operation operation) {
  machine.streams.prepare(stream);
  machine.streams.submit(lock, stream, std::move(operation));
}

// A cuStreamAddCallback call, carried to its turn as a host function's argument.
struct Callback {
  CUstream stream;
  CUstreamCallback function;
  void* user_data;

  static void run(void* argument) {
    const std::unique_ptr<Callback> self(static_cast<Callback*>(argument));
    self->function(self->stream, CUDA_SUCCESS, self->user_data);
  }
};

CUresult check_value(Machine& machine, Address address, unsigned size_bytes) {
  if (address == 0 || address % size_bytes != 0) return CUDA_ERROR_INVALID_VALUE;
  if (!machine.is_device_accessible(address, size_bytes)) return CUDA_ERROR_INVALID_VALUE;
  return machine.is_live(address, size_bytes, true) ? CUDA_SUCCESS : CUDA_ERROR_ILLEGAL_ADDRESS;
}

CUresult write_value(const char* name, CUstream handle, Address address, std::uint64_t value,
                     unsigned size_bytes) {
  return with_stream(name, handle, [=](Machine& machine, Lock& lock, const StreamRef& stream) {
    const CUresult valid = check_value(machine, address, size_bytes);
    if (valid != CUDA_SUCCESS) return valid;
    const auto ticket = machine.streams.prepare(stream);
    machine.streams.release_value(*stream, address);
    const bool found = machine.record_access(*stream, ticket, name, emulator::AccessKind::kWrite,
                                             address, size_bytes);
    Operation operation;
    operation.body = emulator::WriteValue{address, value, size_bytes};
    operation.name = name;
    machine.streams.submit(lock, stream, std::move(operation));
    return machine.hazard_status(found);
  });
}

CUresult wait_value(const char* name, CUstream handle, Address address, std::uint64_t value,
                    unsigned flags, unsigned size_bytes) {
  return with_stream(name, handle, [=](Machine& machine, Lock& lock, const StreamRef& stream) {
    const CUresult valid = check_value(machine, address, size_bytes);
    if (valid != CUDA_SUCCESS) return valid;
    machine.streams.acquire_value(stream.get(), address);
    Operation operation;
    operation.body = emulator::WaitValue{address, value, size_bytes, flags};
    operation.name = name;
    launch(machine, lock, stream, std::move(operation));
    return CUDA_SUCCESS;
  });
}

CUresult capture_status(const char* name, CUstream handle, CUstreamCaptureStatus* status,
                        cuuint64_t* id) {
  return with_stream(name, handle, [=](Machine&, Lock&, const StreamRef&) {
    if (status == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *status = CU_STREAM_CAPTURE_STATUS_NONE;  // capture is not emulated
    if (id != nullptr) *id = 0;
    return CUDA_SUCCESS;
  });
}

// A property of a stream, also of one whose device has an error.
template <typename Value, typename Read>
CUresult get_property(const char* name, CUstream handle, Value* value, Read&& read) {
  return with_driver(name, [&](Machine& machine, Lock&) {
    StreamRef stream;
    const CUresult found = machine.streams.find(handle, &stream);
    if (found != CUDA_SUCCESS) return found;
    if (value == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *value = read(*stream);
    return CUDA_SUCCESS;
  });
}

}  // namespace

extern "C" {

CUresult cuStreamCreate(CUstream* handle, unsigned int flags) {
  return create(__func__, handle, flags, 0);
}

CUresult cuStreamCreateWithPriority(CUstream* handle, unsigned int flags, int priority) {
  return create(__func__, handle, flags, priority);
}

CUresult cuStreamDestroy(CUstream handle) {
  return with_driver(__func__, [=](Machine& machine, Lock&) {
    StreamRef stream;
    if (reinterpret_cast<std::uintptr_t>(handle) <= 2 ||
        machine.streams.find(handle, &stream) != CUDA_SUCCESS) {
      return CUDA_ERROR_INVALID_HANDLE;
    }
    machine.streams.destroy(handle);
    return CUDA_SUCCESS;
  });
}

CUresult cuStreamSynchronize(CUstream handle) {
  return with_stream(__func__, handle, [](Machine& machine, Lock& lock, const StreamRef& stream) {
    machine.streams.synchronize(lock, stream);
    return machine.sticky_error(stream->device);
  });
}

CUresult cuStreamQuery(CUstream handle) {
  return with_stream(__func__, handle, [](Machine& machine, Lock& lock, const StreamRef& stream) {
    const CUresult result = machine.streams.query(lock, stream);
    const CUresult sticky = machine.sticky_error(stream->device);
    return sticky != CUDA_SUCCESS ? sticky : result;
  });
}

CUresult cuStreamWaitEvent(CUstream handle, CUevent event_handle, unsigned int flags) {
  return with_stream(__func__, handle, [=](Machine& machine, Lock& lock, const StreamRef& stream) {
    const emulator::Event* event = machine.events.find(event_handle);
    if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if ((flags & ~unsigned{CU_EVENT_WAIT_EXTERNAL}) != 0) return CUDA_ERROR_INVALID_VALUE;
    machine.events.make_wait(lock, stream, *event);
    return CUDA_SUCCESS;
  });
}

CUresult cuStreamGetFlags(CUstream handle, unsigned int* flags) {
  return get_property(__func__, handle, flags, [](const auto& stream) { return stream.flags; });
}

CUresult cuStreamGetPriority(CUstream handle, int* priority) {
  return get_property(__func__, handle, priority,
                      [](const auto& stream) { return stream.priority; });
}

CUresult cuStreamGetId(CUstream handle, unsigned long long* id) {
  return get_property(__func__, handle, id, [](const auto& stream) { return stream.id; });
}

CUresult cuStreamGetCtx(CUstream handle, CUcontext* context) {
  return get_property(__func__, handle, context,
                      [](const auto& stream) { return stream.context->handle(); });
}

CUresult cuStreamGetDevice(CUstream handle, CUdevice* device) {
  return get_property(__func__, handle, device, [](const auto& stream) { return stream.device; });
}

CUresult cuLaunchHostFunc(CUstream handle, CUhostFn function, void* user_data) {
  return with_stream(__func__, handle, [=](Machine& machine, Lock& lock, const StreamRef& stream) {
    if (function == nullptr) return CUDA_ERROR_INVALID_VALUE;
    Operation operation;
    operation.body = emulator::HostFunction{function, user_data};
    operation.name = "cuLaunchHostFunc";
    launch(machine, lock, stream, std::move(operation));
    return CUDA_SUCCESS;
  });
}

CUresult cuStreamAddCallback(CUstream handle, CUstreamCallback function, void* user_data,
                             unsigned int flags) {
  return with_stream(__func__, handle, [=](Machine& machine, Lock& lock, const StreamRef& stream) {
    if (function == nullptr || flags != 0) return CUDA_ERROR_INVALID_VALUE;
    auto callback = std::make_unique<Callback>(Callback{handle, function, user_data});
    Operation operation;
    operation.body = emulator::HostFunction{Callback::run, callback.release()};
    operation.name = "cuStreamAddCallback";
    launch(machine, lock, stream, std::move(operation));
    return CUDA_SUCCESS;
  });
}

CUresult cuStreamWriteValue32(CUstream handle, CUdeviceptr address, cuuint32_t value,
                              unsigned int) {
  return write_value("cuStreamWriteValue32", handle, address, value, 4);
}

CUresult cuStreamWriteValue64(CUstream handle, CUdeviceptr address, cuuint64_t value,
                              unsigned int) {
  return write_value("cuStreamWriteValue64", handle, address, value, 8);
}

CUresult cuStreamWaitValue32(CUstream handle, CUdeviceptr address, cuuint32_t value,
                             unsigned int flags) {
  return wait_value("cuStreamWaitValue32", handle, address, value, flags, 4);
}

CUresult cuStreamWaitValue64(CUstream handle, CUdeviceptr address, cuuint64_t value,
                             unsigned int flags) {
  return wait_value("cuStreamWaitValue64", handle, address, value, flags, 8);
}

CUresult cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus* status) {
  return capture_status(__func__, handle, status, nullptr);
}

// The three versions of cuStreamGetCaptureInfo differ in what they would say of a capture.
#undef cuStreamGetCaptureInfo
CUresult cuStreamGetCaptureInfo(CUstream handle, CUstreamCaptureStatus* status, cuuint64_t* id) {
  return capture_status(__func__, handle, status, id);
}

CUresult cuStreamGetCaptureInfo_v2(CUstream handle, CUstreamCaptureStatus* status, cuuint64_t* id,
                                   CUgraph*, const CUgraphNode**, std::size_t*) {
  return capture_status(__func__, handle, status, id);
}

CUresult cuStreamGetCaptureInfo_v3(CUstream handle, CUstreamCaptureStatus* status, cuuint64_t* id,
                                   CUgraph*, const CUgraphNode**, const CUgraphEdgeData**,
                                   std::size_t*) {
  return capture_status(__func__, handle, status, id);
}

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  return with_driver(__func__, [=](Machine&, Lock&) {
    if (mode == nullptr || *mode < CU_STREAM_CAPTURE_MODE_GLOBAL ||
        *mode > CU_STREAM_CAPTURE_MODE_RELAXED) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    std::swap(*mode, capture_mode);
    return CUDA_SUCCESS;
  });
}

}  // extern "C"
