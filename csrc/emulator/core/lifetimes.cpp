#include "emulator/core/lifetimes.hpp"

#include <utility>
#include <vector>

namespace spillover::emulator {
namespace {

// Waits for all work on a device (-1: on all), and for whatever runs at this moment.
void settle(Machine& machine, Lock& lock, int device) {
  machine.streams.synchronize_device(lock, device);
  machine.scheduler.wait_for_running_bodies(lock);
  // Allocators free under locks of their own, and hand on what they learn by it.
  if (machine.hazards.enabled()) machine.streams.threads().publish();
}

CUresult not_freeable(Machine& machine, Address address) {
  machine.report_double_free(address);
  return CUDA_ERROR_INVALID_VALUE;
}

// An allocation that starts exactly here and that nobody is freeing already.
Allocation* find_freeable(Machine& machine, Address address) {
  Allocation* allocation = machine.device_memory.find(address);
  if (allocation == nullptr || allocation->address != address || allocation->free_pending ||
      allocation->is_imported()) {
    return nullptr;
  }
  return allocation;
}

const HostRegion* find_region(Machine& machine, Address address, HostRegionKind kind) {
  const HostRegion* region = machine.host_memory.find(address);
  if (region == nullptr || region->address != address || region->kind != kind) return nullptr;
  return region;
}

}  // namespace

CUresult allocate_device_memory(Machine& machine, Lock& lock, int device, std::size_t size_bytes,
                                Pool* pool, Address* address) {
  if (size_bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  if (pool != nullptr && !pool->admits(size_bytes)) return CUDA_ERROR_OUT_OF_MEMORY;
  CUresult result = machine.device_memory.allocate(device, size_bytes, pool, address);
  if (result == CUDA_ERROR_OUT_OF_MEMORY && machine.pending_frees > 0) {
    if (machine.clock.enabled()) machine.clock.wait_device(lock, device);
    machine.scheduler.drain_device(lock, device);  // lets frees that are queued take their turn
    result = machine.device_memory.allocate(device, size_bytes, pool, address);
  }
  if (result == CUDA_SUCCESS) machine.begin_memory(*address, size_bytes);
  if (result == CUDA_SUCCESS && pool != nullptr) {
    pool->add(machine.device_memory.find(*address)->charged_bytes);
  }
  if (result == CUDA_ERROR_OUT_OF_MEMORY && machine.config.verbose) {
    report("out of memory: %zu bytes asked for, %zu of %zu in use on device %d", size_bytes,
           machine.budget.used_bytes(device), machine.budget.capacity_bytes(), device);
  }
  return result;
}

CUresult free_device_memory(Machine& machine, Lock& lock, Address address) {
  const HostRegion* region = find_region(machine, address, HostRegionKind::kManaged);
  if (region != nullptr)
    return remove_host_region(machine, lock, address, HostRegionKind::kManaged);
  const Allocation* allocation = find_freeable(machine, address);
  if (allocation == nullptr) return not_freeable(machine, address);
  settle(machine, lock, allocation->device);
  allocation = find_freeable(machine, address);  // another thread may have freed it meanwhile
  if (allocation == nullptr) return not_freeable(machine, address);
  // Only work of another device can be left, which this call does not wait for.
  const bool found =
      machine.record_host_access("cuMemFree", AccessKind::kFree, address, allocation->size_bytes);
  const CUresult sticky = machine.sticky_error(allocation->device);
  machine.release_allocation(address);
  return sticky != CUDA_SUCCESS ? sticky : machine.hazard_status(found);
}

CUresult free_device_memory_async(Machine& machine, Lock& lock, const StreamRef& stream,
                                  Address address) {
  Allocation* allocation = find_freeable(machine, address);
  if (allocation == nullptr) return not_freeable(machine, address);
  if (allocation->pool == nullptr) return CUDA_ERROR_INVALID_VALUE;
  allocation->free_pending = true;
  ++machine.pending_frees;
  const Ticket ticket = machine.streams.prepare(stream);
  const bool found = machine.record_access(*stream, ticket, "cuMemFreeAsync", AccessKind::kFree,
                                           address, allocation->size_bytes);
  machine.end_memory(address);
  Operation operation;
  operation.body = FreeMemory{address};
  operation.name = "cuMemFreeAsync";
  machine.streams.submit(lock, stream, std::move(operation));
  return machine.hazard_status(found);
}

CUresult release_imported_memory(Machine& machine, Lock& lock, Address address) {
  settle(machine, lock, machine.device_memory.find(address)->device);
  const Allocation* allocation = machine.device_memory.find(address);
  if (allocation == nullptr || !allocation->is_imported()) return CUDA_ERROR_INVALID_VALUE;
  if (allocation->open_count > 1) return CUDA_SUCCESS;  // opened again meanwhile
  const bool found = machine.record_host_access("cuIpcCloseMemHandle", AccessKind::kFree, address,
                                                allocation->size_bytes);
  machine.release_allocation(address);
  return machine.hazard_status(found);
}

void reset_primary_context(Machine& machine, Lock& lock, int device) {
  settle(machine, lock, device);
  std::vector<Address> gone;
  for (const auto& [address, allocation] : machine.device_memory.allocations()) {
    if (allocation.device == device && !allocation.managed_by_pool()) gone.push_back(address);
  }
  for (const Address address : gone) machine.release_allocation(address);
  Context* const context = machine.contexts.primary(device);
  context->retain_count = 0;
  context->flags = 0;
  context->limits = {};
  context->enabled_peers = 0;
  machine.sticky_error(device) = CUDA_SUCCESS;
}

CUresult unmap_memory(Machine& machine, Lock& lock, Address address, std::size_t size_bytes) {
  machine.scheduler.wait_for_running_bodies(lock);
  const CUresult whole = machine.virtual_memory.check_unmap(address, size_bytes);
  if (whole != CUDA_SUCCESS) return whole;
  const bool found =
      machine.record_host_access("cuMemUnmap", AccessKind::kFree, address, size_bytes);
  if (machine.hazards.enabled()) machine.hazards.history().end_range(address, size_bytes);
  machine.virtual_memory.unmap(address, size_bytes);
  machine.forget(address, size_bytes);
  return machine.hazard_status(found);
}

CUresult remove_host_region(Machine& machine, Lock& lock, Address address, HostRegionKind kind) {
  const CUresult missing = kind == HostRegionKind::kRegistered
                               ? CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED
                               : CUDA_ERROR_INVALID_VALUE;
  if (find_region(machine, address, kind) == nullptr) {
    // Unregistering twice gives nothing away twice: the memory is the program's own.
    if (kind != HostRegionKind::kRegistered) machine.report_double_free(address);
    return missing;
  }
  settle(machine, lock, -1);
  const HostRegion* region = find_region(machine, address, kind);
  if (region == nullptr) return missing;
  machine.forget(region->address, region->size_bytes);
  machine.end_memory(address);
  machine.host_memory.remove(address);
  return CUDA_SUCCESS;
}

}  // namespace spillover::emulator
