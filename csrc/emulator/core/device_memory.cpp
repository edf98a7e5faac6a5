#include "emulator/core/device_memory.hpp"

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
  allocations_.emplace(*place, Allocation{*place, size_bytes, charged, device, pool, false});
  *address = *place;
  return CUDA_SUCCESS;
}

void DeviceMemory::free(Address address) {
  const auto position = allocations_.find(address);
  const Allocation allocation = position->second;
  allocations_.erase(position);
  addresses_->unmap(address, allocation.charged_bytes);
  addresses_->give(address, allocation.charged_bytes);
  budget_->refund(allocation.device, allocation.charged_bytes);
}

Allocation* DeviceMemory::find(Address address) {
  auto position = allocations_.upper_bound(address);
  if (position == allocations_.begin()) return nullptr;
  --position;
  Allocation& allocation = position->second;
  return address - allocation.address < allocation.size_bytes ? &allocation : nullptr;
}

}  // namespace spillover::emulator
