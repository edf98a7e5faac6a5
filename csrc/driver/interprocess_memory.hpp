// Memory from cuMemAlloc that several processes have: CUDA's interprocess handles.
//
// Any thread may call. What is opened is of one device's primary context.
#pragma once

#include <array>
#include <cstddef>

#include "driver/types.hpp"

namespace spillover {

// A CUipcMemHandle: bytes that only the driver reads.
using InterprocessHandle = std::array<unsigned char, 64>;

// The handle of memory from cuMemAlloc that begins at the address. Throws DriverError.
InterprocessHandle interprocess_handle(int device, DeviceAddress address);

// Where the allocation that the address lies in begins. Throws DriverError.
DeviceAddress allocation_start(int device, DeviceAddress address);

// Memory of another process. Move-only; the memory must not be in use when the object ends.
class InterprocessMemory {
 public:
  // Throws DriverError, also for a handle of this very process.
  InterprocessMemory(int device, const InterprocessHandle& handle);
  ~InterprocessMemory();
  InterprocessMemory(InterprocessMemory&& other) noexcept;
  InterprocessMemory& operator=(InterprocessMemory&& other) noexcept;
  InterprocessMemory(const InterprocessMemory&) = delete;
  InterprocessMemory& operator=(const InterprocessMemory&) = delete;

  DeviceAddress address() const { return address_; }

 private:
  int device_;
  DeviceAddress address_ = 0;  // 0 when moved from.
};

}  // namespace spillover
