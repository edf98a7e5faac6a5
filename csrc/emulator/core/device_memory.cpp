#include "emulator/core/device_memory.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

namespace spillover::emulator {
namespace {

constexpr std::size_t kPageBytes = 4096;

}  // namespace

Budget::Budget(std::size_t capacity_bytes) : capacity_bytes_(capacity_bytes) {}

bool Budget::charge(int device, std::size_t size_bytes) {
  if (size_bytes > free_bytes(device)) return false;
  Use& use = devices_[index(device)];
  use.used_bytes += size_bytes;
  use.peak_bytes = std::max(use.peak_bytes, use.used_bytes);
  return true;
}

std::size_t Budget::free_bytes(int device) const {
  const Use& use = devices_[index(device)];
  const std::size_t left = capacity_bytes_ - use.used_bytes;
  return left - std::min(left, use.occupied_bytes);
}

void Budget::refund(int device, std::size_t size_bytes) {
  devices_[index(device)].used_bytes -= size_bytes;
}

CUresult DeviceMemory::allocate(int device, std::size_t size_bytes, Pool* pool, Address* address) {
  if (size_bytes > budget_->capacity_bytes()) return CUDA_ERROR_OUT_OF_MEMORY;
  // A driver gives large allocations whole 2 MiB pages; small ones share them.
  const std::size_t unit = size_bytes >= kGranularityBytes ? kGranularityBytes : kPageBytes;
  const std::size_t charged = round_up(size_bytes, unit);
  if (!budget_->charge(device, charged)) return CUDA_ERROR_OUT_OF_MEMORY;
  const auto place = addresses_->take(charged, unit);
  if (!place) {
    budget_->refund(device, charged);
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  if (!addresses_->map_fresh(*place, charged, fresh_)) {
    addresses_->give(*place, charged);
    budget_->refund(device, charged);
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  allocations_.emplace(*place, Allocation{.address = *place,
                                          .size_bytes = size_bytes,
                                          .charged_bytes = charged,
                                          .device = device,
                                          .pool = pool});
  *address = *place;
  return CUDA_SUCCESS;
}

void DeviceMemory::free(Address address) {
  const auto position = allocations_.find(address);
  const Allocation allocation = position->second;
  allocations_.erase(position);
  addresses_->unmap(address, allocation.charged_bytes);
  addresses_->give(address, allocation.charged_bytes);
  if (allocation.file >= 0) close(allocation.file);  // from now on nobody can open it
  if (!allocation.is_imported()) budget_->refund(allocation.device, allocation.charged_bytes);
}

CUresult DeviceMemory::share(Allocation* allocation) {
  if (allocation->file >= 0) return CUDA_SUCCESS;
  allocation->file = addresses_->move_to_file(allocation->address, allocation->charged_bytes);
  return allocation->file < 0 ? CUDA_ERROR_MAP_FAILED : CUDA_SUCCESS;
}

CUresult DeviceMemory::import(int file, const ProcessFile& origin, std::size_t size_bytes,
                              int device, Address* address) {
  const std::size_t unit = size_bytes >= kGranularityBytes ? kGranularityBytes : kPageBytes;
  const std::size_t span = round_up(size_bytes, unit);
  const auto place = addresses_->take(span, unit);
  if (!place) return CUDA_ERROR_MAP_FAILED;
  if (!addresses_->map_file(*place, span, file, 0, PROT_READ | PROT_WRITE)) {
    addresses_->give(*place, span);
    return CUDA_ERROR_MAP_FAILED;
  }
  allocations_.emplace(*place, Allocation{.address = *place,
                                          .size_bytes = size_bytes,
                                          .charged_bytes = span,
                                          .device = device,
                                          .file = file,
                                          .origin = origin,
                                          .open_count = 1});
  *address = *place;
  return CUDA_SUCCESS;
}

Allocation* DeviceMemory::find_imported(const ProcessFile& origin) {
  for (auto& [address, allocation] : allocations_) {
    if (allocation.is_imported() && allocation.origin == origin) return &allocation;
  }
  return nullptr;
}

Allocation* DeviceMemory::find(Address address) {
  auto position = allocations_.upper_bound(address);
  if (position == allocations_.begin()) return nullptr;
  --position;
  Allocation& allocation = position->second;
  return address - allocation.address < allocation.size_bytes ? &allocation : nullptr;
}

}  // namespace spillover::emulator
