// Memory and events that processes share by handle. Physical memory made by cuMemCreate is shared
// by descriptor instead (virtual_memory.cpp).
#include "emulator/core/interprocess.hpp"

#include "emulator/libcuda/api_call.hpp"

namespace emulator = spillover::emulator;
using emulator::Address;
using emulator::Context;
using emulator::Event;
using emulator::Lock;
using emulator::Machine;
using emulator::with_context;

extern "C" {

CUresult cuIpcGetMemHandle(CUipcMemHandle* handle, CUdeviceptr pointer) {
  return with_context(__func__, [=](Machine& machine, Lock&, Context&) {
    if (handle == nullptr) return CUDA_ERROR_INVALID_VALUE;
    return emulator::export_memory(machine, pointer, handle);
  });
}

CUresult cuIpcOpenMemHandle(CUdeviceptr* pointer, CUipcMemHandle handle, unsigned int flags) {
  return with_context(__func__, [&](Machine& machine, Lock&, Context& context) {
    // There is one flag, and it has to be given.
    if (pointer == nullptr || flags != CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    Address address = 0;
    const CUresult result = emulator::open_memory(machine, context, handle, &address);
    if (result == CUDA_SUCCESS) *pointer = address;
    return result;
  });
}

CUresult cuIpcCloseMemHandle(CUdeviceptr pointer) {
  return with_context(__func__, [=](Machine& machine, Lock& lock, Context&) {
    return emulator::close_memory(machine, lock, pointer);
  });
}

CUresult cuIpcGetEventHandle(CUipcEventHandle* handle, CUevent event_handle) {
  return with_context(__func__, [=](Machine& machine, Lock&, Context&) {
    if (handle == nullptr) return CUDA_ERROR_INVALID_VALUE;
    const Event* event = machine.events.find(event_handle);
    return event == nullptr ? CUDA_ERROR_INVALID_HANDLE : emulator::export_event(*event, handle);
  });
}

CUresult cuIpcOpenEventHandle(CUevent* event, CUipcEventHandle handle) {
  return with_context(__func__, [&](Machine& machine, Lock&, Context& context) {
    return event == nullptr ? CUDA_ERROR_INVALID_VALUE
                            : emulator::open_event(machine, context, handle, event);
  });
}

}  // extern "C"
