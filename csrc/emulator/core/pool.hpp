// Pools of the stream-ordered allocator (cuMemAllocAsync). A pool does not cache: memory is taken
// from the device at the call and given back when the free's turn comes; what a pool keeps are its
// counters and attributes. Owned by the Machine; guarded by Machine::mutex.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#include "emulator/core/types.hpp"

namespace spillover::emulator {

struct Pool {
  CUmemoryPool handle = nullptr;
  int device = 0;
  bool is_default = false;
  std::uint64_t release_threshold_bytes = 0;
  std::uint64_t used_bytes = 0;
  std::uint64_t used_bytes_max = 0;
  std::uint64_t size_bytes_max = 0;  // from CUmemPoolProps::maxSize; 0: the device's capacity
  int reuse_follow_event_dependencies = 1;
  int reuse_allow_opportunistic = 1;
  int reuse_allow_internal_dependencies = 1;
  bool destroyed = false;  // freed once its last allocation is

  // By device, what cuMemPoolSetAccess allows; its own device always reaches it.
  std::array<CUmemAccess_flags, kDeviceCountMax> device_access{};

  bool admits(std::size_t size_bytes) const {
    return size_bytes_max == 0 || used_bytes + size_bytes <= size_bytes_max;
  }
  void add(std::size_t size_bytes) {
    used_bytes += size_bytes;
    used_bytes_max = std::max(used_bytes_max, used_bytes);
  }
};

}  // namespace spillover::emulator
