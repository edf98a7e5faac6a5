// Devices, their memory and the driver's version.
//
// Thread-safe. Apart from driver_available() each function throws DriverError without a driver and
// StateError in a forked child.
#pragma once

#include <cstddef>
#include <optional>
#include <string>

namespace spillover {

// Whether a driver can be loaded and has started. Never throws; false in a forked child.
bool driver_available() noexcept;

// CUDA version that the driver supports: 1000 * major + 10 * minor.
int driver_version();

int device_count();

// What tables of devices have room for.
inline constexpr int kDevicesMax = 64;

// Throws ConfigError for a device that does not exist. Makes no context.
void require_device(int device);

// These make no context.
std::string device_name(int device);
size_t device_total_bytes(int device);

// The NUMA node of the host that the device is nearest to, where the driver (from CUDA 12.2 on) and
// the system know of one.
std::optional<int> device_numa_node(int device);
// Such as "0000:65:00.0", as the kernel writes it.
std::string device_pci_address(int device);

struct MemoryInfo {
  size_t free_bytes;
  size_t total_bytes;
};

MemoryInfo memory_info(int device);

// Blocks until all work of the device's primary context is complete.
void synchronize_device(int device);

// The same for destructors of what the device may still use: never throws, reports a failure.
void synchronize_device_for_release(int device) noexcept;

}  // namespace spillover
