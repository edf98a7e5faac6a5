// Device memory from cuMemAlloc.
//
// Move-only. The release, cuMemFree, waits for the device's work, so it needs no events.
#pragma once

#include <cstddef>
#include <optional>

#include "driver/types.hpp"

namespace spillover {

class DeviceMemory {
 public:
  // Empty when the device has not that much left; throws DriverError for any other failure.
  static std::optional<DeviceMemory> try_allocate(int device, size_t size_bytes);

  ~DeviceMemory();
  DeviceMemory(DeviceMemory&& other) noexcept;
  DeviceMemory& operator=(DeviceMemory&& other) noexcept;
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  DeviceAddress address() const { return address_; }
  size_t size_bytes() const { return size_bytes_; }

  // Gives the memory back. Throws DriverError: with address() unchanged where the driver could not
  // be asked, and 0 where it returned an error, of which nobody knows whether the memory is free
  // now.
  void release();

 private:
  DeviceMemory(int device, DeviceAddress address, size_t size_bytes)
      : device_(device), address_(address), size_bytes_(size_bytes) {}

  int device_;
  DeviceAddress address_;  // 0 when moved from or released.
  size_t size_bytes_;
};

}  // namespace spillover
