#include "driver/device_memory.hpp"

#include <utility>

#include "driver/check_result.hpp"
#include "driver/context.hpp"
#include "driver/fork_guard.hpp"

namespace spillover {

std::optional<DeviceMemory> DeviceMemory::try_allocate(int device, size_t size_bytes) {
  const ContextScope scope(device);
  CUdeviceptr pointer = 0;
  const CUresult result = SPILLOVER_DRIVER_CALL(cuMemAlloc, &pointer, size_bytes);
  if (result == CUDA_ERROR_OUT_OF_MEMORY) return std::nullopt;
  check(result, "cuMemAlloc", size_bytes);
  return DeviceMemory(device, static_cast<DeviceAddress>(pointer), size_bytes);
}

void DeviceMemory::release() {
  if (address_ == 0) return;
  const ContextScope scope(device_);
  const DeviceAddress address = std::exchange(address_, 0);
  SPILLOVER_CHECKED_CALL(cuMemFree, static_cast<CUdeviceptr>(address));
}

DeviceMemory::~DeviceMemory() {
  if (address_ == 0 || in_forked_child()) return;
  const ReleaseContextScope scope(device_);
  SPILLOVER_RELEASE_CALL(cuMemFree, static_cast<CUdeviceptr>(address_));
}

DeviceMemory::DeviceMemory(DeviceMemory&& other) noexcept
    : device_(other.device_),
      address_(std::exchange(other.address_, 0)),
      size_bytes_(other.size_bytes_) {}

DeviceMemory& DeviceMemory::operator=(DeviceMemory&& other) noexcept {
  std::swap(device_, other.device_);
  std::swap(address_, other.address_);
  std::swap(size_bytes_, other.size_bytes_);
  return *this;
}

}  // namespace spillover
