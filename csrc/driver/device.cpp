#include "driver/device.hpp"

#include <array>
#include <cstdio>
#include <exception>
#include <string>

#include "base/error.hpp"
#include "driver/check_result.hpp"
#include "driver/context.hpp"

namespace spillover {

bool driver_available() noexcept {
  try {
    driver_functions();
    return true;
  } catch (const std::exception&) {
    // "No driver" is this question's answer; whoever needs the reason calls driver_version().
    return false;
  }
}

int driver_version() {
  int version = 0;
  SPILLOVER_CHECKED_CALL(cuDriverGetVersion, &version);
  return version;
}

int device_count() {
  int count = 0;
  SPILLOVER_CHECKED_CALL(cuDeviceGetCount, &count);
  return count;
}

void require_device(int device) {
  const int count = device_count();
  if (device >= 0 && device < count && device < kDevicesMax) return;
  throw ConfigError("device " + std::to_string(device) + " does not exist; there " +
                    (count == 1 ? "is 1 device" : "are " + std::to_string(count) + " devices") +
                    ", numbered from 0");
}

std::string device_name(int device) {
  require_device(device);
  CUdevice handle = 0;
  SPILLOVER_CHECKED_CALL(cuDeviceGet, &handle, device);
  std::array<char, 256> name{};
  SPILLOVER_CHECKED_CALL(cuDeviceGetName, name.data(), static_cast<int>(name.size()), handle);
  return name.data();
}

std::optional<int> device_numa_node(int device) {
  require_device(device);
  CUdevice handle = 0;
  SPILLOVER_CHECKED_CALL(cuDeviceGet, &handle, device);
  int node = -1;
  // An older driver refuses the question.
  const CUresult result =
      SPILLOVER_DRIVER_CALL(cuDeviceGetAttribute, &node, CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID, handle);
  if (result != CUDA_SUCCESS || node < 0) return std::nullopt;
  return node;
}

std::string device_pci_address(int device) {
  require_device(device);
  CUdevice handle = 0;
  SPILLOVER_CHECKED_CALL(cuDeviceGet, &handle, device);
  int domain = 0;
  int bus = 0;
  int slot = 0;
  SPILLOVER_CHECKED_CALL(cuDeviceGetAttribute, &domain, CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID, handle);
  SPILLOVER_CHECKED_CALL(cuDeviceGetAttribute, &bus, CU_DEVICE_ATTRIBUTE_PCI_BUS_ID, handle);
  SPILLOVER_CHECKED_CALL(cuDeviceGetAttribute, &slot, CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID, handle);
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%04x:%02x:%02x.0", domain, bus, slot);
  return text.data();
}

size_t device_total_bytes(int device) {
  require_device(device);
  CUdevice handle = 0;
  SPILLOVER_CHECKED_CALL(cuDeviceGet, &handle, device);
  size_t total_bytes = 0;
  SPILLOVER_CHECKED_CALL(cuDeviceTotalMem, &total_bytes, handle);
  return total_bytes;
}

MemoryInfo memory_info(int device) {
  const ContextScope scope(device);
  MemoryInfo info{};
  SPILLOVER_CHECKED_CALL(cuMemGetInfo, &info.free_bytes, &info.total_bytes);
  return info;
}

void synchronize_device(int device) {
  const ContextScope scope(device);
  SPILLOVER_CHECKED_CALL(cuCtxSynchronize);
}

void synchronize_device_for_release(int device) noexcept {
  const ReleaseContextScope scope(device);
  SPILLOVER_RELEASE_CALL(cuCtxSynchronize);
}

}  // namespace spillover
