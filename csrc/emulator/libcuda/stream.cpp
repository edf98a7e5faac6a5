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
using emulator::with_work;

namespace {

constexpr int kPriorityGreatest = -5;

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
  if (stream->capture != nullptr) {
    emulator::NodeWork work;
    if (auto* const function = std::get_if<emulator::HostFunction>(&operation.body)) {
      work = std::move(*function);
    } else if (const auto* const wait = std::get_if<emulator::WaitValue>(&operation.body)) {
      work = *wait;
    }
    machine.captures.add(stream, operation.name, std::move(work));
    return;
  }
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
                     unsigned flags, unsigned size_bytes) {
  return with_work(name, handle, [=](Machine& machine, Lock& lock, const StreamRef& stream) {
    if ((flags & ~unsigned{CU_STREAM_WRITE_VALUE_NO_MEMORY_BARRIER}) != 0) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    const CUresult valid = check_value(machine, address, size_bytes);
    if (valid != CUDA_SUCCESS) return valid;
    if (stream->capture != nullptr) {
      machine.captures.add(stream, name, emulator::WriteValue{address, value, size_bytes});
      return CUDA_SUCCESS;
    }
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
  return with_work(name, handle, [=](Machine& machine, Lock& lock, const StreamRef& stream) {
    constexpr unsigned kComparisons = 3;  // CU_STREAM_WAIT_VALUE_*: four of them in two bits
    if ((flags & ~(kComparisons | unsigned{CU_STREAM_WAIT_VALUE_FLUSH})) != 0) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    const CUresult valid = check_value(machine, address, size_bytes);
    if (valid != CUDA_SUCCESS) return valid;
    if (stream->capture == nullptr) machine.streams.acquire_value(stream.get(), address);
    Operation operation;
    operation.body = emulator::WaitValue{address, value, size_bytes, flags};
    operation.name = name;
    launch(machine, lock, stream, std::move(operation));
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
    const CUresult admitted = machine.captures.admit_wait(stream);
    if (admitted != CUDA_SUCCESS) return admitted;
    machine.streams.synchronize(lock, stream);
    return machine.sticky_error(stream->device);
  });
}

CUresult cuStreamQuery(CUstream handle) {
  return with_stream(__func__, handle, [](Machine& machine, Lock& lock, const StreamRef& stream) {
    const CUresult admitted = machine.captures.admit_wait(stream);
    if (admitted != CUDA_SUCCESS) return admitted;
    const CUresult result = machine.streams.query(lock, stream);
    const CUresult sticky = machine.sticky_error(stream->device);
    return sticky != CUDA_SUCCESS ? sticky : result;
  });
}

CUresult cuStreamWaitEvent(CUstream handle, CUevent event_handle, unsigned int flags) {
  return with_work(__func__, handle, [=](Machine& machine, Lock&, const StreamRef& stream) {
    const emulator::Event* event = machine.events.find(event_handle);
    if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    if ((flags & ~unsigned{CU_EVENT_WAIT_EXTERNAL}) != 0) return CUDA_ERROR_INVALID_VALUE;
    if (stream->capture != nullptr || event->capture != nullptr) {
      return machine.captures.wait(stream, event_handle, *event, flags);
    }
    machine.events.make_wait(stream, *event);
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
  return with_work(__func__, handle, [=](Machine& machine, Lock& lock, const StreamRef& stream) {
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
  return with_work(__func__, handle, [=](Machine& machine, Lock& lock, const StreamRef& stream) {
    if (function == nullptr || flags != 0) return CUDA_ERROR_INVALID_VALUE;
    if (stream->capture != nullptr) {  // CUDA has no node for it
      machine.captures.invalidate(stream->capture->capture.get());
      return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    auto callback = std::make_unique<Callback>(Callback{handle, function, user_data});
    Operation operation;
    operation.body = emulator::HostFunction{Callback::run, callback.release()};
    operation.name = "cuStreamAddCallback";
    launch(machine, lock, stream, std::move(operation));
    return CUDA_SUCCESS;
  });
}

CUresult cuStreamWriteValue32(CUstream handle, CUdeviceptr address, cuuint32_t value,
                              unsigned int flags) {
  return write_value("cuStreamWriteValue32", handle, address, value, flags, 4);
}

CUresult cuStreamWriteValue64(CUstream handle, CUdeviceptr address, cuuint64_t value,
                              unsigned int flags) {
  return write_value("cuStreamWriteValue64", handle, address, value, flags, 8);
}

CUresult cuStreamWaitValue32(CUstream handle, CUdeviceptr address, cuuint32_t value,
                             unsigned int flags) {
  return wait_value("cuStreamWaitValue32", handle, address, value, flags, 4);
}

CUresult cuStreamWaitValue64(CUstream handle, CUdeviceptr address, cuuint64_t value,
                             unsigned int flags) {
  return wait_value("cuStreamWaitValue64", handle, address, value, flags, 8);
}

}  // extern "C"
