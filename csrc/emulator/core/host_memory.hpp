// Host memory that the device knows: pinned by cuMemHostAlloc, registered by cuMemHostRegister, or
// managed (cuMemAllocManaged, which this device keeps in host memory all its life).
//
// Owned by the Machine; guarded by Machine::mutex.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <map>

#include "emulator/core/types.hpp"

namespace spillover::emulator {

enum class HostRegionKind { kAllocated, kRegistered, kManaged };

struct HostRegion {
  Address address = 0;
  std::size_t size_bytes = 0;
  HostRegionKind kind = HostRegionKind::kAllocated;
  unsigned flags = 0;
  int device = 0;  // whose context was current
};

class HostMemory {
 public:
  // Phantom memory is of a dry run: it need not fit into this machine.
  explicit HostMemory(bool phantom) : phantom_(phantom) {}

  // The most bytes that may be pinned (allocated or registered) at a time, as a container's limit
  // on locked memory sets it. What is pinned already stays.
  void limit_pinned(std::size_t size_bytes) { pinned_bytes_max_ = size_bytes; }

  // kind is kAllocated or kManaged. CUDA_ERROR_OUT_OF_MEMORY past the limit.
  CUresult allocate(HostRegion request, Address* address);

  // Takes the program's own memory in; request.kind is kRegistered.
  CUresult add(const HostRegion& request);

  // Forgets the region that starts here, and unmaps what allocate mapped. It must exist.
  void remove(Address address);

  // The region that contains address, or nullptr.
  const HostRegion* find(Address address) const;

  // True when all of [address, address + size_bytes) lies in one region.
  bool covers(Address address, std::size_t size_bytes) const;

  const std::map<Address, HostRegion>& regions() const { return regions_; }

 private:
  bool may_pin(const HostRegion& request) const {
    return request.kind == HostRegionKind::kManaged || pinned_bytes_max_ == SIZE_MAX ||
           (pinned_bytes_ <= pinned_bytes_max_ &&
            request.size_bytes <= pinned_bytes_max_ - pinned_bytes_);
  }
  void insert(const HostRegion& region);

  const bool phantom_;
  std::map<Address, HostRegion> regions_;
  std::size_t pinned_bytes_ = 0;  // of regions that are not managed
  std::size_t pinned_bytes_max_ = SIZE_MAX;
};

}  // namespace spillover::emulator
