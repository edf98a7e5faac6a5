// CUDA's virtual memory: address ranges, physical memory, and mappings of one into the other.
//
// Each class is move-only and owns one driver object. A Mapping holds the range and the memory that
// it joins, so they are released in the right order whatever the order in which their users go.
// Methods may be called from any thread. Unmapping is not ordered with streams: whoever destroys a
// Mapping knows that the work on it is complete.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "driver/types.hpp"

namespace spillover {

// The unit of sizes and offsets below, bytes (2 MiB on the devices of today).
size_t allocation_granularity(int device);

// A range of device addresses without memory behind it.
class AddressReservation {
 public:
  // alignment 0 lets the driver choose.
  AddressReservation(int device, size_t size_bytes, size_t alignment = 0);
  ~AddressReservation();
  AddressReservation(AddressReservation&& other) noexcept;
  AddressReservation& operator=(AddressReservation&& other) noexcept;
  AddressReservation(const AddressReservation&) = delete;
  AddressReservation& operator=(const AddressReservation&) = delete;

  DeviceAddress address() const { return address_; }
  size_t size_bytes() const { return size_bytes_; }
  int device() const { return device_; }

 private:
  int device_ = -1;
  DeviceAddress address_ = 0;  // 0 when moved from.
  size_t size_bytes_ = 0;
};

// Memory of a device without an address.
class PhysicalMemory {
 public:
  // Throws DeviceOutOfMemoryError.
  PhysicalMemory(int device, size_t size_bytes);
  ~PhysicalMemory();
  PhysicalMemory(PhysicalMemory&& other) noexcept;
  PhysicalMemory& operator=(PhysicalMemory&& other) noexcept;
  PhysicalMemory(const PhysicalMemory&) = delete;
  PhysicalMemory& operator=(const PhysicalMemory&) = delete;

  uint64_t handle() const { return handle_; }
  size_t size_bytes() const { return size_bytes_; }
  int device() const { return device_; }

 private:
  int device_ = -1;
  uint64_t handle_ = 0;  // A CUmemGenericAllocationHandle; 0 when moved from.
  size_t size_bytes_ = 0;
};

// Physical memory at an offset of a reservation, readable and writable by the memory's device.
class Mapping {
 public:
  Mapping(std::shared_ptr<const AddressReservation> reservation, size_t offset_bytes,
          std::shared_ptr<const PhysicalMemory> memory);
  ~Mapping();
  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&& other) noexcept;
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  DeviceAddress address() const { return address_; }
  size_t size_bytes() const { return memory_ ? memory_->size_bytes() : 0; }

 private:
  std::shared_ptr<const AddressReservation> reservation_;
  std::shared_ptr<const PhysicalMemory> memory_;
  DeviceAddress address_ = 0;  // 0 when moved from.
};

}  // namespace spillover
