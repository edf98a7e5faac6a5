// The stream-ordered allocator and its pools.
#include "emulator/core/pool.hpp"

#include <memory>

#include "emulator/core/lifetimes.hpp"
#include "emulator/libcuda/api_call.hpp"

namespace emulator = spillover::emulator;
using emulator::Address;
using emulator::is_device;
using emulator::Lock;
using emulator::Machine;
using emulator::Pool;
using emulator::StreamRef;
using emulator::with_driver;

namespace {

Pool* find_pool(Machine& machine, CUmemoryPool handle) {
  std::unique_ptr<Pool>* found = machine.pools.find(handle);
  return found == nullptr || (*found)->destroyed ? nullptr : found->get();
}

// A function of one pool: body(Machine&, Pool&) -> CUresult.
template <typename Body>
CUresult with_pool(const char* name, CUmemoryPool handle, Body&& body) {
  return with_driver(name, [&](Machine& machine, Lock&) {
    Pool* pool = find_pool(machine, handle);
    return pool == nullptr ? CUDA_ERROR_INVALID_VALUE : body(machine, *pool);
  });
}

CUresult allocate(Machine& machine, Lock& lock, Pool* pool, const StreamRef& stream,
                  std::size_t size_bytes, CUdeviceptr* pointer) {
  if (pointer == nullptr || pool == nullptr) return CUDA_ERROR_INVALID_VALUE;
  machine.streams.order_with_default(stream);
  Address address = 0;
  const CUresult result =
      emulator::allocate_device_memory(machine, lock, pool->device, size_bytes, pool, &address);
  if (result == CUDA_SUCCESS) *pointer = address;
  return result;
}

// Where a pool keeps an attribute that is an int; nullptr for other attributes.
int* flag_of(Pool& pool, CUmemPool_attribute attribute) {
  switch (attribute) {
    case CU_MEMPOOL_ATTR_REUSE_FOLLOW_EVENT_DEPENDENCIES:
      return &pool.reuse_follow_event_dependencies;
    case CU_MEMPOOL_ATTR_REUSE_ALLOW_OPPORTUNISTIC:
      return &pool.reuse_allow_opportunistic;
    case CU_MEMPOOL_ATTR_REUSE_ALLOW_INTERNAL_DEPENDENCIES:
      return &pool.reuse_allow_internal_dependencies;
    default:
      return nullptr;
  }
}

// A pool's own device cannot be shut out of it.
CUresult check_access(const Machine& machine, const Pool& pool, const CUmemAccessDesc& access) {
  if (access.location.type != CU_MEM_LOCATION_TYPE_DEVICE) return CUDA_ERROR_INVALID_VALUE;
  if (!is_device(machine, access.location.id)) return CUDA_ERROR_INVALID_DEVICE;
  switch (access.flags) {
    case CU_MEM_ACCESS_FLAGS_PROT_READWRITE:
      return CUDA_SUCCESS;
    case CU_MEM_ACCESS_FLAGS_PROT_NONE:
    case CU_MEM_ACCESS_FLAGS_PROT_READ:
      return access.location.id == pool.device ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
}

}  // namespace

namespace {

// with_stream for stream-ordered memory, of which a capture would make nodes that are not emulated.
template <typename Body>
CUresult with_memory_work(const char* name, CUstream handle, Body&& body) {
  return emulator::with_work(
      name, handle, [&](Machine& machine, Lock& lock, const StreamRef& stream) {
        if (stream->capture == nullptr) return body(machine, lock, stream);
        emulator::report("%s: memory nodes of CUDA graphs are not emulated", name);
        return machine.captures.admit_wait(stream);
      });
}

}  // namespace

extern "C" {

CUresult cuMemAllocAsync(CUdeviceptr* pointer, std::size_t size_bytes, CUstream handle) {
  return with_memory_work(
      __func__, handle, [=](Machine& machine, Lock& lock, const StreamRef& stream) {
        Pool* pool = machine.devices[static_cast<std::size_t>(stream->device)].current_pool;
        return allocate(machine, lock, pool, stream, size_bytes, pointer);
      });
}

CUresult cuMemAllocFromPoolAsync(CUdeviceptr* pointer, std::size_t size_bytes,
                                 CUmemoryPool pool_handle, CUstream handle) {
  return with_memory_work(__func__, handle,
                          [=](Machine& machine, Lock& lock, const StreamRef& stream) {
                            return allocate(machine, lock, find_pool(machine, pool_handle), stream,
                                            size_bytes, pointer);
                          });
}

CUresult cuMemFreeAsync(CUdeviceptr pointer, CUstream handle) {
  return with_memory_work(
      __func__, handle, [=](Machine& machine, Lock& lock, const StreamRef& stream) {
        return emulator::free_device_memory_async(machine, lock, stream, pointer);
      });
}

CUresult cuDeviceGetDefaultMemPool(CUmemoryPool* pool, CUdevice device) {
  return with_driver(__func__, [=](Machine& machine, Lock&) {
    if (!is_device(machine, device)) return CUDA_ERROR_INVALID_DEVICE;
    if (pool == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *pool = machine.devices[static_cast<std::size_t>(device)].default_pool->handle;
    return CUDA_SUCCESS;
  });
}

CUresult cuDeviceGetMemPool(CUmemoryPool* pool, CUdevice device) {
  return with_driver(__func__, [=](Machine& machine, Lock&) {
    if (!is_device(machine, device)) return CUDA_ERROR_INVALID_DEVICE;
    if (pool == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *pool = machine.devices[static_cast<std::size_t>(device)].current_pool->handle;
    return CUDA_SUCCESS;
  });
}

CUresult cuDeviceSetMemPool(CUdevice device, CUmemoryPool handle) {
  return with_pool(__func__, handle, [=](Machine& machine, Pool& pool) {
    if (!is_device(machine, device)) return CUDA_ERROR_INVALID_DEVICE;
    if (pool.device != device) return CUDA_ERROR_INVALID_VALUE;
    machine.devices[static_cast<std::size_t>(device)].current_pool = &pool;
    return CUDA_SUCCESS;
  });
}

CUresult cuMemPoolCreate(CUmemoryPool* handle, const CUmemPoolProps* properties) {
  return with_driver(__func__, [=](Machine& machine, Lock&) {
    if (handle == nullptr || properties == nullptr ||
        properties->allocType != CU_MEM_ALLOCATION_TYPE_PINNED) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    if (properties->location.type != CU_MEM_LOCATION_TYPE_DEVICE ||
        properties->handleTypes != CU_MEM_HANDLE_TYPE_NONE) {
      return CUDA_ERROR_NOT_SUPPORTED;
    }
    if (!is_device(machine, properties->location.id)) return CUDA_ERROR_INVALID_VALUE;
    auto pool = std::make_unique<Pool>();
    Pool* const raw = pool.get();
    raw->device = properties->location.id;
    raw->size_bytes_max = properties->maxSize;
    raw->device_access[static_cast<std::size_t>(raw->device)] = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    machine.pools.insert(std::move(pool), &raw->handle);
    *handle = raw->handle;
    return CUDA_SUCCESS;
  });
}

CUresult cuMemPoolDestroy(CUmemoryPool handle) {
  return with_pool(__func__, handle, [=](Machine& machine, Pool& pool) {
    if (pool.is_default) return CUDA_ERROR_INVALID_VALUE;
    emulator::Device& device = machine.devices[static_cast<std::size_t>(pool.device)];
    if (device.current_pool == &pool) device.current_pool = device.default_pool;
    pool.destroyed = true;
    if (pool.used_bytes == 0) machine.pools.erase(handle);
    return CUDA_SUCCESS;
  });
}

CUresult cuMemPoolTrimTo(CUmemoryPool handle, std::size_t) {
  // Pools hold nothing back, so there is nothing to trim.
  return with_pool(__func__, handle, [](Machine&, Pool&) { return CUDA_SUCCESS; });
}

CUresult cuMemPoolSetAttribute(CUmemoryPool handle, CUmemPool_attribute attribute, void* value) {
  return with_pool(__func__, handle, [=](Machine&, Pool& pool) {
    if (value == nullptr) return CUDA_ERROR_INVALID_VALUE;
    const std::uint64_t number =
        flag_of(pool, attribute) == nullptr ? *static_cast<const cuuint64_t*>(value) : 0;
    switch (attribute) {
      case CU_MEMPOOL_ATTR_RELEASE_THRESHOLD:
        pool.release_threshold_bytes = number;
        return CUDA_SUCCESS;
      case CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH:
      case CU_MEMPOOL_ATTR_USED_MEM_HIGH:
        if (number != 0) return CUDA_ERROR_INVALID_VALUE;  // it can only be reset
        pool.used_bytes_max = pool.used_bytes;
        return CUDA_SUCCESS;
      default:
        if (flag_of(pool, attribute) == nullptr) return CUDA_ERROR_INVALID_VALUE;
        *flag_of(pool, attribute) = *static_cast<const int*>(value);
        return CUDA_SUCCESS;
    }
  });
}

CUresult cuMemPoolGetAttribute(CUmemoryPool handle, CUmemPool_attribute attribute, void* value) {
  return with_pool(__func__, handle, [=](Machine&, Pool& pool) {
    if (value == nullptr) return CUDA_ERROR_INVALID_VALUE;
    auto* const number = static_cast<cuuint64_t*>(value);
    switch (attribute) {
      case CU_MEMPOOL_ATTR_RELEASE_THRESHOLD:
        *number = pool.release_threshold_bytes;
        return CUDA_SUCCESS;
      case CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT:
      case CU_MEMPOOL_ATTR_USED_MEM_CURRENT:
        *number = pool.used_bytes;
        return CUDA_SUCCESS;
      case CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH:
      case CU_MEMPOOL_ATTR_USED_MEM_HIGH:
        *number = pool.used_bytes_max;
        return CUDA_SUCCESS;
      default:
        if (flag_of(pool, attribute) == nullptr) return CUDA_ERROR_INVALID_VALUE;
        *static_cast<int*>(value) = *flag_of(pool, attribute);
        return CUDA_SUCCESS;
    }
  });
}

CUresult cuMemPoolSetAccess(CUmemoryPool handle, const CUmemAccessDesc* descriptors,
                            std::size_t count) {
  return with_pool(__func__, handle, [=](Machine& machine, Pool& pool) {
    if (descriptors == nullptr && count != 0) return CUDA_ERROR_INVALID_VALUE;
    for (std::size_t i = 0; i < count; ++i) {
      const CUresult result = check_access(machine, pool, descriptors[i]);
      if (result != CUDA_SUCCESS) return result;
    }
    for (std::size_t i = 0; i < count; ++i) {
      pool.device_access[static_cast<std::size_t>(descriptors[i].location.id)] =
          descriptors[i].flags;
    }
    return CUDA_SUCCESS;
  });
}

CUresult cuMemPoolGetAccess(CUmemAccess_flags* flags, CUmemoryPool handle,
                            CUmemLocation* location) {
  return with_pool(__func__, handle, [=](Machine& machine, Pool& pool) {
    if (flags == nullptr || location == nullptr) return CUDA_ERROR_INVALID_VALUE;
    if (location->type != CU_MEM_LOCATION_TYPE_DEVICE) return CUDA_ERROR_INVALID_VALUE;
    if (!is_device(machine, location->id)) return CUDA_ERROR_INVALID_DEVICE;
    *flags = pool.device_access[static_cast<std::size_t>(location->id)];
    return CUDA_SUCCESS;
  });
}

}  // extern "C"
