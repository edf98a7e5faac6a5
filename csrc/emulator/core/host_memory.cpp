#include "emulator/core/host_memory.hpp"

#include <sys/mman.h>

#include <iterator>

namespace spillover::emulator {
namespace {

constexpr std::size_t kPageBytes = 4096;

}  // namespace

void HostMemory::insert(const HostRegion& region) {
  regions_.emplace(region.address, region);
  if (region.kind != HostRegionKind::kManaged) pinned_bytes_ += region.size_bytes;
}

CUresult HostMemory::allocate(HostRegion request, Address* address) {
  if (!may_pin(request)) return CUDA_ERROR_OUT_OF_MEMORY;
  void* memory = mmap(nullptr, round_up(request.size_bytes, kPageBytes), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | (phantom_ ? MAP_NORESERVE : 0), -1, 0);
  if (memory == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  request.address = reinterpret_cast<Address>(memory);
  insert(request);
  *address = request.address;
  return CUDA_SUCCESS;
}

CUresult HostMemory::add(const HostRegion& request) {
  const auto next = regions_.lower_bound(request.address + request.size_bytes);
  if (next != regions_.begin()) {
    const HostRegion& previous = std::prev(next)->second;
    if (previous.address + previous.size_bytes > request.address) {
      return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
    }
  }
  if (!may_pin(request)) return CUDA_ERROR_OUT_OF_MEMORY;
  insert(request);
  return CUDA_SUCCESS;
}

void HostMemory::remove(Address address) {
  const auto position = regions_.find(address);
  const HostRegion region = position->second;
  regions_.erase(position);
  if (region.kind != HostRegionKind::kManaged) pinned_bytes_ -= region.size_bytes;
  if (region.kind == HostRegionKind::kRegistered) return;
  munmap(reinterpret_cast<void*>(region.address), round_up(region.size_bytes, kPageBytes));
}

const HostRegion* HostMemory::find(Address address) const {
  auto position = regions_.upper_bound(address);
  if (position == regions_.begin()) return nullptr;
  const HostRegion& region = std::prev(position)->second;
  return address - region.address < region.size_bytes ? &region : nullptr;
}

bool HostMemory::covers(Address address, std::size_t size_bytes) const {
  const HostRegion* region = find(address);
  return region != nullptr && size_bytes <= region->address + region->size_bytes - address;
}

}  // namespace spillover::emulator
