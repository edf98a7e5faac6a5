#include "driver/virtual_memory.hpp"

#include <fcntl.h>

#include <utility>
#include <vector>

#include "driver/check_result.hpp"
#include "driver/context.hpp"

namespace spillover {
namespace {

CUmemAllocationProp properties_of(int device, PhysicalMemory::Sharing sharing) {
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  properties.location.id = device;
  if (sharing == PhysicalMemory::Sharing::kExportable) {
    properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  }
  return properties;
}

int attribute_of(int device, CUdevice_attribute attribute) {
  CUdevice handle = 0;
  SPILLOVER_CHECKED_CALL(cuDeviceGet, &handle, device);
  int value = 0;
  SPILLOVER_CHECKED_CALL(cuDeviceGetAttribute, &value, attribute, handle);
  return value;
}

}  // namespace

bool supports_virtual_memory(int device) {
  const DriverFunctions& functions = driver_functions();
  return attribute_of(device, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED) != 0 &&
         functions.p_cuMemCreate != nullptr && functions.p_cuMemAddressReserve != nullptr &&
         functions.p_cuMemMap != nullptr;
}

bool supports_file_handles(int device) {
  const DriverFunctions& functions = driver_functions();
  return attribute_of(device, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED) !=
             0 &&
         functions.p_cuMemExportToShareableHandle != nullptr &&
         functions.p_cuMemImportFromShareableHandle != nullptr;
}

size_t allocation_granularity(int device) {
  const ContextScope scope(device);
  const CUmemAllocationProp properties = properties_of(device, PhysicalMemory::Sharing::kPrivate);
  size_t granularity_bytes = 0;
  SPILLOVER_CHECKED_CALL(cuMemGetAllocationGranularity, &granularity_bytes, &properties,
                         CU_MEM_ALLOC_GRANULARITY_MINIMUM);
  return granularity_bytes;
}

AddressReservation::AddressReservation(int device, size_t size_bytes, size_t alignment)
    : device_(device), size_bytes_(size_bytes) {
  const ContextScope scope(device);
  CUdeviceptr address = 0;
  check(SPILLOVER_DRIVER_CALL(cuMemAddressReserve, &address, size_bytes, alignment, 0, 0),
        "cuMemAddressReserve", size_bytes);
  address_ = static_cast<DeviceAddress>(address);
}

AddressReservation::~AddressReservation() {
  if (address_ != 0) {
    SPILLOVER_RELEASE_CALL(cuMemAddressFree, static_cast<CUdeviceptr>(address_), size_bytes_);
  }
}

AddressReservation::AddressReservation(AddressReservation&& other) noexcept
    : device_(other.device_),
      address_(std::exchange(other.address_, 0)),
      size_bytes_(other.size_bytes_) {}

AddressReservation& AddressReservation::operator=(AddressReservation&& other) noexcept {
  std::swap(device_, other.device_);
  std::swap(address_, other.address_);
  std::swap(size_bytes_, other.size_bytes_);
  return *this;
}

std::optional<PhysicalMemory> PhysicalMemory::try_create(int device, size_t size_bytes,
                                                         Sharing sharing) {
  const ContextScope scope(device);
  const CUmemAllocationProp properties = properties_of(device, sharing);
  CUmemGenericAllocationHandle handle = 0;
  const CUresult result = SPILLOVER_DRIVER_CALL(cuMemCreate, &handle, size_bytes, &properties, 0);
  if (result == CUDA_ERROR_OUT_OF_MEMORY) return std::nullopt;
  check(result, "cuMemCreate", size_bytes);
  return PhysicalMemory(device, handle, size_bytes);
}

PhysicalMemory PhysicalMemory::import_file(int device, const FileDescriptor& file,
                                           size_t size_bytes) {
  const ContextScope scope(device);
  CUmemGenericAllocationHandle handle = 0;
  // The driver takes the number itself where it says pointer.
  auto* number = reinterpret_cast<void*>(static_cast<intptr_t>(file.number()));
  SPILLOVER_CHECKED_CALL(cuMemImportFromShareableHandle, &handle, number,
                         CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
  return {device, handle, size_bytes};
}

FileDescriptor PhysicalMemory::export_file() const {
  const ContextScope scope(device_);
  int number = -1;
  SPILLOVER_CHECKED_CALL(cuMemExportToShareableHandle, &number, handle_,
                         CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
  // Programs that this one starts have no use for it, and would keep the memory.
  fcntl(number, F_SETFD, FD_CLOEXEC);
  return FileDescriptor(number);
}

void PhysicalMemory::release() {
  if (handle_ == 0) return;
  const ContextScope scope(device_);
  SPILLOVER_CHECKED_CALL(cuMemRelease, std::exchange(handle_, 0));
}

PhysicalMemory::~PhysicalMemory() {
  if (handle_ != 0) SPILLOVER_RELEASE_CALL(cuMemRelease, handle_);
}

PhysicalMemory::PhysicalMemory(PhysicalMemory&& other) noexcept
    : device_(other.device_),
      handle_(std::exchange(other.handle_, 0)),
      size_bytes_(other.size_bytes_) {}

PhysicalMemory& PhysicalMemory::operator=(PhysicalMemory&& other) noexcept {
  std::swap(device_, other.device_);
  std::swap(handle_, other.handle_);
  std::swap(size_bytes_, other.size_bytes_);
  return *this;
}

void map_memory(DeviceAddress address, const PhysicalMemory& memory) {
  const ContextScope scope(memory.device());
  check(SPILLOVER_DRIVER_CALL(cuMemMap, static_cast<CUdeviceptr>(address), memory.size_bytes(), 0,
                              memory.handle(), 0),
        "cuMemMap", memory.size_bytes());
}

void allow_access(DeviceAddress address, size_t size_bytes, std::span<const int> devices) {
  const ContextScope scope(devices.front());
  std::vector<CUmemAccessDesc> access(devices.size());
  for (size_t i = 0; i < devices.size(); ++i) {
    access[i].location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    access[i].location.id = devices[i];
    access[i].flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  }
  check(SPILLOVER_DRIVER_CALL(cuMemSetAccess, static_cast<CUdeviceptr>(address), size_bytes,
                              access.data(), access.size()),
        "cuMemSetAccess", size_bytes);
}

void unmap_memory(int device, DeviceAddress address, size_t size_bytes) {
  // Who unmaps gives the memory up: the driver is asked whatever it says of the context.
  const ReleaseContextScope scope(device);
  check(SPILLOVER_DRIVER_CALL(cuMemUnmap, static_cast<CUdeviceptr>(address), size_bytes),
        "cuMemUnmap", size_bytes);
}

void unmap_memory_for_release(int device, DeviceAddress address, size_t size_bytes) noexcept {
  const ReleaseContextScope scope(device);
  SPILLOVER_RELEASE_CALL(cuMemUnmap, static_cast<CUdeviceptr>(address), size_bytes);
}

}  // namespace spillover
