#include "driver/interprocess_memory.hpp"

#include <cstring>
#include <utility>

#include "driver/check_result.hpp"
#include "driver/context.hpp"
#include "driver/fork_guard.hpp"

namespace spillover {

InterprocessHandle interprocess_handle(int device, DeviceAddress address) {
  const ContextScope scope(device);
  CUipcMemHandle handle{};
  SPILLOVER_CHECKED_CALL(cuIpcGetMemHandle, &handle, static_cast<CUdeviceptr>(address));
  static_assert(sizeof(handle) == sizeof(InterprocessHandle));
  InterprocessHandle bytes{};
  std::memcpy(bytes.data(), &handle, sizeof handle);
  return bytes;
}

DeviceAddress allocation_start(int device, DeviceAddress address) {
  const ContextScope scope(device);
  CUdeviceptr begin = 0;
  SPILLOVER_CHECKED_CALL(cuMemGetAddressRange, &begin, nullptr, static_cast<CUdeviceptr>(address));
  return static_cast<DeviceAddress>(begin);
}

InterprocessMemory::InterprocessMemory(int device, const InterprocessHandle& handle)
    : device_(device) {
  const ContextScope scope(device);
  CUipcMemHandle native{};
  std::memcpy(&native, handle.data(), sizeof native);
  CUdeviceptr pointer = 0;
  SPILLOVER_CHECKED_CALL(cuIpcOpenMemHandle, &pointer, native, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
  address_ = static_cast<DeviceAddress>(pointer);
}

InterprocessMemory::~InterprocessMemory() {
  if (address_ == 0 || in_forked_child()) return;
  const ReleaseContextScope scope(device_);
  SPILLOVER_RELEASE_CALL(cuIpcCloseMemHandle, static_cast<CUdeviceptr>(address_));
}

InterprocessMemory::InterprocessMemory(InterprocessMemory&& other) noexcept
    : device_(other.device_), address_(std::exchange(other.address_, 0)) {}

InterprocessMemory& InterprocessMemory::operator=(InterprocessMemory&& other) noexcept {
  std::swap(device_, other.device_);
  std::swap(address_, other.address_);
  return *this;
}

}  // namespace spillover
