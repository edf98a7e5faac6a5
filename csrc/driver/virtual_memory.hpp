// CUDA's virtual memory: address ranges, physical memory, and mappings of one into the other.
//
// Each class is move-only and owns one driver object. Who maps keeps both the range and the memory
// until it has unmapped. Everything may be called from any thread. Unmapping is not ordered with
// streams: whoever unmaps knows that the work on the memory is complete.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "base/file_descriptor.hpp"
#include "driver/types.hpp"

namespace spillover {

// Whether the device has virtual memory management at all.
bool supports_virtual_memory(int device);

// Whether physical memory can be given to other processes by file descriptors.
bool supports_file_handles(int device);

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
  enum class Sharing {
    kPrivate,
    kExportable,  // Other processes can get it by a file descriptor.
  };

  // Empty when the device has not that much left; throws DriverError for any other failure.
  static std::optional<PhysicalMemory> try_create(int device, size_t size_bytes,
                                                  Sharing sharing = Sharing::kPrivate);
  // Memory of another process; the file may be closed afterwards. size_bytes is what that process
  // made. Throws DriverError.
  static PhysicalMemory import_file(int device, const FileDescriptor& file, size_t size_bytes);
  ~PhysicalMemory();
  PhysicalMemory(PhysicalMemory&& other) noexcept;
  PhysicalMemory& operator=(PhysicalMemory&& other) noexcept;
  PhysicalMemory(const PhysicalMemory&) = delete;
  PhysicalMemory& operator=(const PhysicalMemory&) = delete;

  uint64_t handle() const { return handle_; }
  size_t size_bytes() const { return size_bytes_; }
  int device() const { return device_; }

  // A new descriptor of exportable memory, which keeps the memory until it is closed, as does a
  // process that has imported it. Throws DriverError.
  FileDescriptor export_file() const;

  // Gives the memory back, now or when the last mapping of it goes. Throws DriverError; the memory
  // then is neither owned nor usable any more.
  void release();

 private:
  PhysicalMemory(int device, uint64_t handle, size_t size_bytes)
      : device_(device), handle_(handle), size_bytes_(size_bytes) {}

  int device_ = -1;
  uint64_t handle_ = 0;  // A CUmemGenericAllocationHandle; 0 when moved from or released.
  size_t size_bytes_ = 0;
};

// The calls below take ranges inside of a reservation and throw DriverError.

// Puts memory at an address; no device may access it yet.
void map_memory(DeviceAddress address, const PhysicalMemory& memory);

// Lets the devices read and write mapped memory, which lies on the first of them.
void allow_access(DeviceAddress address, size_t size_bytes, std::span<const int> devices);

// Takes whole mappings, one or more, away from their addresses.
void unmap_memory(int device, DeviceAddress address, size_t size_bytes);

// The same for destructors: never throws, reports a failure. Nothing happens in a forked child.
void unmap_memory_for_release(int device, DeviceAddress address, size_t size_bytes) noexcept;

}  // namespace spillover
