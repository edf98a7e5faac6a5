// Contexts: primary, created, current.
#include "emulator/core/lifetimes.hpp"
#include "emulator/libcuda/api_call.hpp"

namespace emulator = spillover::emulator;
using emulator::Context;
using emulator::CurrentContext;
using emulator::is_device;
using emulator::Lock;
using emulator::Machine;
using emulator::with_context;
using emulator::with_driver;
using emulator::with_thread;

namespace {

// The default of a limit that CUDA defines; 0 for one that this device does not have.
std::size_t default_limit(CUlimit limit) {
  switch (limit) {
    case CU_LIMIT_STACK_SIZE:
      return 1024;
    case CU_LIMIT_PRINTF_FIFO_SIZE:
      return std::size_t{1} << 20;
    case CU_LIMIT_MALLOC_HEAP_SIZE:
      return std::size_t{8} << 20;
    case CU_LIMIT_MAX_L2_FETCH_GRANULARITY:
      return 64;
    case CU_LIMIT_DEV_RUNTIME_SYNC_DEPTH:
      return 2;
    case CU_LIMIT_DEV_RUNTIME_PENDING_LAUNCH_COUNT:
      return 2048;
    default:
      return 0;
  }
}

// How a thread may wait for the device: CU_CTX_SCHED_*, one at most; beside it some bits that make
// no difference here.
bool are_flags(unsigned flags) {
  const unsigned waiting = flags & CU_CTX_SCHED_MASK;
  return (flags & ~unsigned{CU_CTX_FLAGS_MASK}) == 0 && (waiting & (waiting - 1)) == 0;
}

CUresult create(Machine& machine, CUcontext* context, unsigned flags, CUdevice device) {
  if (context == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (!is_device(machine, device)) return CUDA_ERROR_INVALID_DEVICE;
  if (!are_flags(flags)) return CUDA_ERROR_INVALID_VALUE;
  Context* created = machine.contexts.create(device, flags);
  if (!CurrentContext::push(created)) return CUDA_ERROR_OUT_OF_MEMORY;
  *context = created->handle();
  return CUDA_SUCCESS;
}

// Bit of a peer in Context::enabled_peers; fails for the context itself, and for another one on its
// device.
CUresult peer_bit(Machine& machine, const Context& context, CUcontext peer, unsigned* bit) {
  const Context* other = machine.contexts.find(peer);
  if (other == nullptr || other == &context) return CUDA_ERROR_INVALID_CONTEXT;
  if (other->device == context.device) return CUDA_ERROR_INVALID_DEVICE;
  *bit = 1U << other->device;
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return with_driver(__func__, [=](Machine& machine, Lock&) {
    if (context == nullptr) return CUDA_ERROR_INVALID_VALUE;
    if (!is_device(machine, device)) return CUDA_ERROR_INVALID_DEVICE;
    Context* primary = machine.contexts.primary(device);
    ++primary->retain_count;
    *context = primary->handle();
    return CUDA_SUCCESS;
  });
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
  return with_driver(__func__, [=](Machine& machine, Lock&) {
    if (!is_device(machine, device)) return CUDA_ERROR_INVALID_DEVICE;
    Context* primary = machine.contexts.primary(device);
    if (primary->retain_count == 0) return CUDA_ERROR_INVALID_CONTEXT;
    --primary->retain_count;  // its memory stays: programs rarely mean to lose it, and it is theirs
    return CUDA_SUCCESS;
  });
}

CUresult cuDevicePrimaryCtxReset_v2(CUdevice device) {
  return with_driver(__func__, [=](Machine& machine, Lock& lock) {
    if (!is_device(machine, device)) return CUDA_ERROR_INVALID_DEVICE;
    emulator::reset_primary_context(machine, lock, device);
    return CUDA_SUCCESS;
  });
}

CUresult cuDevicePrimaryCtxSetFlags_v2(CUdevice device, unsigned int flags) {
  return with_driver(__func__, [=](Machine& machine, Lock&) {
    if (!is_device(machine, device)) return CUDA_ERROR_INVALID_DEVICE;
    if (!are_flags(flags)) return CUDA_ERROR_INVALID_VALUE;
    machine.contexts.primary(device)->flags = flags;
    return CUDA_SUCCESS;
  });
}

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned int* flags, int* active) {
  return with_driver(__func__, [=](Machine& machine, Lock&) {
    if (!is_device(machine, device)) return CUDA_ERROR_INVALID_DEVICE;
    const Context* primary = machine.contexts.primary(device);
    if (flags != nullptr) *flags = primary->flags;
    if (active != nullptr) *active = primary->retain_count > 0 ? 1 : 0;
    return CUDA_SUCCESS;
  });
}

CUresult cuCtxCreate_v2(CUcontext* context, unsigned int flags, CUdevice device) {
  return with_driver(
      __func__, [=](Machine& machine, Lock&) { return create(machine, context, flags, device); });
}

CUresult cuCtxCreate_v4(CUcontext* context, CUctxCreateParams* parameters, unsigned int flags,
                        CUdevice device) {
  return with_driver(__func__, [=](Machine& machine, Lock&) {
    if (parameters != nullptr &&
        (parameters->numExecAffinityParams != 0 || parameters->cigParams != nullptr)) {
      return CUDA_ERROR_NOT_SUPPORTED;
    }
    return create(machine, context, flags, device);
  });
}

CUresult cuCtxDestroy_v2(CUcontext handle) {
  return with_driver(__func__, [=](Machine& machine, Lock& lock) {
    Context* context = machine.contexts.find(handle);
    if (context == nullptr || context->is_primary) return CUDA_ERROR_INVALID_CONTEXT;
    machine.streams.synchronize_device(lock, context->device);
    context->is_live = false;
    if (CurrentContext::get() == context) CurrentContext::pop();
    return CUDA_SUCCESS;
  });
}

CUresult cuCtxSetCurrent(CUcontext handle) {
  return with_driver(__func__, [=](Machine& machine, Lock&) {
    Context* context = machine.contexts.find(handle);
    if (handle != nullptr && context == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
    CurrentContext::set(context);
    return CUDA_SUCCESS;
  });
}

CUresult cuCtxGetCurrent(CUcontext* handle) {
  return with_thread(__func__, [=] {
    if (handle == nullptr) return CUDA_ERROR_INVALID_VALUE;
    Context* context = CurrentContext::get();
    *handle = context == nullptr ? nullptr : context->handle();
    return CUDA_SUCCESS;
  });
}

CUresult cuCtxPushCurrent_v2(CUcontext handle) {
  return with_driver(__func__, [=](Machine& machine, Lock&) {
    Context* context = machine.contexts.find(handle);
    if (context == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
    return CurrentContext::push(context) ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
  });
}

CUresult cuCtxPopCurrent_v2(CUcontext* handle) {
  return with_driver(__func__, [=](Machine&, Lock&) {
    Context* context = CurrentContext::pop();
    if (context == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
    if (handle != nullptr) *handle = context->handle();
    return CUDA_SUCCESS;
  });
}

CUresult cuCtxGetDevice(CUdevice* device) {
  return with_thread(__func__, [=] {
    if (device == nullptr) return CUDA_ERROR_INVALID_VALUE;
    const Context* context = CurrentContext::get();
    if (context == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
    *device = context->device;
    return CUDA_SUCCESS;
  });
}

CUresult cuCtxGetDevice_v2(CUdevice* device, CUcontext handle) {
  return with_driver(__func__, [=](Machine& machine, Lock&) {
    if (device == nullptr) return CUDA_ERROR_INVALID_VALUE;
    const Context* context = machine.contexts.find(handle);
    if (context == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
    *device = context->device;
    return CUDA_SUCCESS;
  });
}

CUresult cuCtxGetFlags(unsigned int* flags) {
  return with_context(__func__, [=](Machine&, Lock&, Context& context) {
    if (flags == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *flags = context.flags;
    return CUDA_SUCCESS;
  });
}

CUresult cuCtxGetId(CUcontext handle, unsigned long long* id) {
  return with_driver(__func__, [=](Machine& machine, Lock&) {
    const Context* context =
        handle == nullptr ? CurrentContext::get() : machine.contexts.find(handle);
    if (context == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
    if (id == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *id = context->id;
    return CUDA_SUCCESS;
  });
}

CUresult cuCtxGetApiVersion(CUcontext handle, unsigned int* version) {
  return with_driver(__func__, [=](Machine& machine, Lock&) {
    const Context* context =
        handle == nullptr ? CurrentContext::get() : machine.contexts.find(handle);
    if (context == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
    if (version == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *version = 3020;
    return CUDA_SUCCESS;
  });
}

CUresult cuCtxSynchronize() {
  return with_context(__func__, [](Machine& machine, Lock& lock, Context& context) {
    const CUresult admitted = machine.captures.admit_device_wait(context.device);
    if (admitted != CUDA_SUCCESS) return admitted;
    machine.streams.synchronize_device(lock, context.device);
    return machine.sticky_error(context.device);
  });
}

CUresult cuCtxSynchronize_v2(CUcontext handle) {
  return with_driver(__func__, [=](Machine& machine, Lock& lock) {
    const Context* context =
        handle == nullptr ? CurrentContext::get() : machine.contexts.find(handle);
    if (context == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
    const CUresult admitted = machine.captures.admit_device_wait(context->device);
    if (admitted != CUDA_SUCCESS) return admitted;
    machine.streams.synchronize_device(lock, context->device);
    return machine.sticky_error(context->device);
  });
}

CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  return with_context(__func__, [=](Machine&, Lock&, Context&) {
    if (least != nullptr) *least = 0;
    if (greatest != nullptr) *greatest = -5;
    return CUDA_SUCCESS;
  });
}

CUresult cuCtxGetLimit(std::size_t* value, CUlimit limit) {
  return with_context(__func__, [=](Machine&, Lock&, Context& context) {
    if (value == nullptr || limit < 0 || limit >= CU_LIMIT_MAX) return CUDA_ERROR_INVALID_VALUE;
    const std::size_t initial = default_limit(limit);
    if (initial == 0) return CUDA_ERROR_UNSUPPORTED_LIMIT;
    const std::size_t set = context.limits[static_cast<std::size_t>(limit)];
    *value = set != 0 ? set : initial;
    return CUDA_SUCCESS;
  });
}

CUresult cuCtxSetLimit(CUlimit limit, std::size_t value) {
  return with_context(__func__, [=](Machine&, Lock&, Context& context) {
    if (limit < 0 || limit >= CU_LIMIT_MAX) return CUDA_ERROR_INVALID_VALUE;
    if (default_limit(limit) == 0) return CUDA_ERROR_UNSUPPORTED_LIMIT;
    context.limits[static_cast<std::size_t>(limit)] = value;
    return CUDA_SUCCESS;
  });
}

CUresult cuCtxGetCacheConfig(CUfunc_cache* config) {
  return with_context(__func__, [=](Machine&, Lock&, Context&) {
    if (config == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *config = CU_FUNC_CACHE_PREFER_NONE;  // as on every GPU whose L1 cache does not split
    return CUDA_SUCCESS;
  });
}

CUresult cuCtxSetCacheConfig(CUfunc_cache config) {
  return with_context(__func__, [=](Machine&, Lock&, Context&) {
    return emulator::is_cache_config(config) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
  });
}

CUresult cuCtxEnablePeerAccess(CUcontext peer, unsigned int flags) {
  return with_context(__func__, [=](Machine& machine, Lock&, Context& context) {
    unsigned bit = 0;
    const CUresult result = peer_bit(machine, context, peer, &bit);
    if (result != CUDA_SUCCESS) return result;
    if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
    if ((context.enabled_peers & bit) != 0) return CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED;
    context.enabled_peers |= bit;
    return CUDA_SUCCESS;
  });
}

CUresult cuCtxDisablePeerAccess(CUcontext peer) {
  return with_context(__func__, [=](Machine& machine, Lock&, Context& context) {
    unsigned bit = 0;
    const CUresult result = peer_bit(machine, context, peer, &bit);
    if (result != CUDA_SUCCESS) return result;
    if ((context.enabled_peers & bit) == 0) return CUDA_ERROR_PEER_ACCESS_NOT_ENABLED;
    context.enabled_peers &= ~bit;
    return CUDA_SUCCESS;
  });
}

}  // extern "C"
