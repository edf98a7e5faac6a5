#include "driver/virtual_memory.hpp"

#include <string>
#include <utility>

#include "base/bytes.hpp"
#include "base/error.hpp"
#include "driver/check_result.hpp"
#include "driver/context.hpp"

namespace spillover {
namespace {

CUmemAllocationProp properties_of(int device) {
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  properties.location.id = device;
  return properties;
}

}  // namespace

size_t allocation_granularity(int device) {
  const ContextScope scope(device);
  const CUmemAllocationProp properties = properties_of(device);
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

PhysicalMemory::PhysicalMemory(int device, size_t size_bytes)
    : device_(device), size_bytes_(size_bytes) {
  const ContextScope scope(device);
  const CUmemAllocationProp properties = properties_of(device);
  CUmemGenericAllocationHandle handle = 0;
  check(SPILLOVER_DRIVER_CALL(cuMemCreate, &handle, size_bytes, &properties, 0), "cuMemCreate",
        size_bytes);
  handle_ = handle;
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

Mapping::Mapping(std::shared_ptr<const AddressReservation> reservation, size_t offset_bytes,
                 std::shared_ptr<const PhysicalMemory> memory)
    : reservation_(std::move(reservation)), memory_(std::move(memory)) {
  const size_t size_bytes = memory_->size_bytes();
  if (offset_bytes > reservation_->size_bytes() ||
      size_bytes > reservation_->size_bytes() - offset_bytes) {
    throw ConfigError("a mapping of " + format_bytes(size_bytes) + " at offset " +
                      std::to_string(offset_bytes) + " does not fit a reservation of " +
                      format_bytes(reservation_->size_bytes()));
  }
  const ContextScope scope(memory_->device());
  const auto target = static_cast<CUdeviceptr>(reservation_->address() + offset_bytes);
  check(SPILLOVER_DRIVER_CALL(cuMemMap, target, size_bytes, 0, memory_->handle(), 0), "cuMemMap",
        size_bytes);
  CUmemAccessDesc access{};
  access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  access.location.id = memory_->device();
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  const CUresult result = SPILLOVER_DRIVER_CALL(cuMemSetAccess, target, size_bytes, &access, 1);
  if (result != CUDA_SUCCESS) {
    // The destructor does not run for an object that was never made.
    SPILLOVER_RELEASE_CALL(cuMemUnmap, target, size_bytes);
    throw_failure(result, "cuMemSetAccess", size_bytes);
  }
  address_ = static_cast<DeviceAddress>(target);
}

Mapping::~Mapping() {
  if (address_ != 0) {
    SPILLOVER_RELEASE_CALL(cuMemUnmap, static_cast<CUdeviceptr>(address_), memory_->size_bytes());
  }
}

Mapping::Mapping(Mapping&& other) noexcept
    : reservation_(std::move(other.reservation_)),
      memory_(std::move(other.memory_)),
      address_(std::exchange(other.address_, 0)) {}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  std::swap(reservation_, other.reservation_);
  std::swap(memory_, other.memory_);
  std::swap(address_, other.address_);
  return *this;
}

}  // namespace spillover
