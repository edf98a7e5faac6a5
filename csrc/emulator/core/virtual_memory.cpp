#include "emulator/core/virtual_memory.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <iterator>

#include "emulator/core/config.hpp"
#include "emulator/core/process_file.hpp"
#include "emulator/core/writer_pause.hpp"

namespace spillover::emulator {
namespace {

// Room for handles in a device's file; sparse, so only what is used costs memory.
constexpr std::size_t kStoreBytes = std::size_t{1} << 42;

int open_memory_file(std::size_t size_bytes) {
  return emulator::open_memory_file("spillover-emulator-vram", size_bytes);
}

bool copy_bytes(int source, std::size_t source_offset, int target, std::size_t size_bytes) {
  std::vector<char> buffer(kGranularityBytes);
  std::size_t done = 0;
  while (done < size_bytes) {
    const std::size_t part = std::min(buffer.size(), size_bytes - done);
    const ssize_t got =
        pread(source, buffer.data(), part, static_cast<off_t>(source_offset + done));
    if (got <= 0 || pwrite(target, buffer.data(), static_cast<std::size_t>(got),
                           static_cast<off_t>(done)) != got) {
      return false;
    }
    done += static_cast<std::size_t>(got);
  }
  return true;
}

bool granular(std::size_t value) {
  return value % kGranularityBytes == 0;
}

int to_protection(unsigned access) {
  if (access == CU_MEM_ACCESS_FLAGS_PROT_READWRITE) return PROT_READ | PROT_WRITE;
  return access == CU_MEM_ACCESS_FLAGS_PROT_READ ? PROT_READ : PROT_NONE;
}

}  // namespace

VirtualMemory::VirtualMemory(AddressSpace* addresses, Budget* budget, bool poison, int device_count)
    : addresses_(addresses),
      budget_(budget),
      poison_(poison),
      stores_(static_cast<std::size_t>(device_count)) {}

CUresult VirtualMemory::reserve(std::size_t size_bytes, std::size_t alignment, Address hint,
                                Address* address) {
  if (size_bytes == 0 || !granular(size_bytes)) return CUDA_ERROR_INVALID_VALUE;
  if ((alignment & (alignment - 1)) != 0) return CUDA_ERROR_INVALID_VALUE;
  const auto place = addresses_->take(size_bytes, std::max(alignment, kGranularityBytes), hint);
  if (!place) return CUDA_ERROR_OUT_OF_MEMORY;
  reservations_.emplace(*place, size_bytes);
  *address = *place;
  return CUDA_SUCCESS;
}

CUresult VirtualMemory::free_reservation(Address address, std::size_t size_bytes) {
  const auto position = reservations_.find(address);
  if (position == reservations_.end() || position->second != size_bytes) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  const auto mapping = mappings_.lower_bound(address);
  if (mapping != mappings_.end() && mapping->first < address + size_bytes) {
    return CUDA_ERROR_INVALID_VALUE;  // still mapped
  }
  reservations_.erase(position);
  addresses_->give(address, size_bytes);
  return CUDA_SUCCESS;
}

CUresult VirtualMemory::place(std::size_t size_bytes, Physical* physical) {
  Store& store = stores_[static_cast<std::size_t>(physical->device)];
  if (!store.ranges.has_value()) {
    store.file = open_memory_file(kStoreBytes);
    if (store.file < 0) return CUDA_ERROR_OUT_OF_MEMORY;
    store.ranges.emplace(0, kStoreBytes);
  }
  const auto offset = store.ranges->take(size_bytes, kGranularityBytes);
  if (!offset) return CUDA_ERROR_OUT_OF_MEMORY;
  physical->file = store.file;
  physical->offset_bytes = *offset;
  return CUDA_SUCCESS;
}

void VirtualMemory::fill_with_poison(const Physical& physical) {
  // Written, not mapped and filled: that costs half as much. Where it fails the memory is zero,
  // which a program must not rely on either.
  static const auto* const poison = new std::vector<unsigned char>(kGranularityBytes, 0xFF);
  std::size_t done = 0;
  while (done < physical.size_bytes) {
    const std::size_t part = std::min(poison->size(), physical.size_bytes - done);
    const ssize_t written = pwrite(physical.file, poison->data(), part,
                                   static_cast<off_t>(physical.offset_bytes + done));
    if (written <= 0) return;
    done += static_cast<std::size_t>(written);
  }
}

CUresult VirtualMemory::create(std::size_t size_bytes, const CUmemAllocationProp& properties,
                               PhysicalId* id) {
  if (size_bytes == 0 || !granular(size_bytes)) return CUDA_ERROR_INVALID_VALUE;
  Physical physical;
  physical.size_bytes = size_bytes;
  physical.device = properties.location.id;
  physical.properties = properties;
  if (!budget_->charge(physical.device, size_bytes)) return CUDA_ERROR_OUT_OF_MEMORY;
  physical.charged_bytes = size_bytes;
  const CUresult placed = place(size_bytes, &physical);
  if (placed != CUDA_SUCCESS) {
    budget_->refund(physical.device, size_bytes);
    return placed;
  }
  if (poison_) fill_with_poison(physical);
  *id = next_id_++;
  physical_.emplace(*id, physical);
  return CUDA_SUCCESS;
}

void VirtualMemory::leave_store(const Physical& physical) {
  fallocate(physical.file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
            static_cast<off_t>(physical.offset_bytes), static_cast<off_t>(physical.size_bytes));
  auto& ranges = stores_[static_cast<std::size_t>(physical.device)].ranges;
  if (ranges.has_value()) ranges->give(physical.offset_bytes, physical.size_bytes);
}

bool VirtualMemory::give_own_file(PhysicalId id) {
  Physical& physical = physical_.at(id);
  if (physical.owns_file) return true;
  const int file = open_memory_file(physical.size_bytes);
  if (file < 0) return false;
  const auto mapped = std::find_if(mappings_.begin(), mappings_.end(), [&](const auto& entry) {
    return physical.mappings != 0 && entry.second.physical == id;
  });
  std::optional<WriterPause> pause;
  bool moved = true;
  if (mapped != mappings_.end()) {
    const auto& [address, mapping] = *mapped;
    pause.emplace(addresses_->to_host(address), mapping.size_bytes);
    moved = addresses_->protect(address, mapping.size_bytes,
                                to_protection(mapping.access) & ~PROT_WRITE);
  }
  moved = moved && copy_bytes(physical.file, physical.offset_bytes, file, physical.size_bytes);
  if (mapped != mappings_.end()) {
    const auto& [address, mapping] = *mapped;
    const int protection = to_protection(mapping.access);
    moved = moved && addresses_->map_file(address, mapping.size_bytes, file, mapping.offset_bytes,
                                          protection);
    if (!moved) addresses_->protect(address, mapping.size_bytes, protection);
  }
  if (!moved) {
    close(file);
    return false;
  }
  leave_store(physical);
  physical.file = file;
  physical.offset_bytes = 0;
  physical.owns_file = true;
  return true;
}

void VirtualMemory::erase_if_unused(PhysicalId id) {
  const auto position = physical_.find(id);
  const Physical& physical = position->second;
  if (physical.references > 0 || physical.mappings > 0) return;
  if (physical.owns_file) {
    close(physical.file);
  } else {
    leave_store(physical);
  }
  if (physical.alias_key != 0) {
    dead_keys_.push_back({physical.alias_key, physical.size_bytes});
    --alias_count_;
  }
  budget_->refund(physical.device, physical.charged_bytes);
  physical_.erase(position);
}

CUresult VirtualMemory::release(PhysicalId id) {
  const auto position = physical_.find(id);
  if (position == physical_.end() || position->second.references == 0) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  --position->second.references;
  erase_if_unused(id);
  return CUDA_SUCCESS;
}

CUresult VirtualMemory::retain(Address address, PhysicalId* id) {
  const Mapping* mapping = find_mapping(address);
  if (mapping == nullptr) return CUDA_ERROR_INVALID_VALUE;
  ++physical_.at(mapping->physical).references;
  *id = mapping->physical;
  return CUDA_SUCCESS;
}

CUresult VirtualMemory::export_file(PhysicalId id, int* file) {
  const Physical* found = physical(id);
  if (found == nullptr || !found->is_exportable()) return CUDA_ERROR_INVALID_VALUE;
  if (!give_own_file(id)) return CUDA_ERROR_OUT_OF_MEMORY;
  *file = fcntl(found->file, F_DUPFD_CLOEXEC, 0);
  return *file < 0 ? CUDA_ERROR_OPERATING_SYSTEM : CUDA_SUCCESS;
}

CUresult VirtualMemory::import_file(int file, int device, PhysicalId* id) {
  struct stat imported{};
  if (fstat(file, &imported) != 0 || imported.st_size == 0) return CUDA_ERROR_INVALID_VALUE;
  for (auto& [known_id, known] : physical_) {  // memory of this very process: the same handle again
    struct stat other{};
    if (!known.owns_file || fstat(known.file, &other) != 0) continue;
    if (other.st_ino != imported.st_ino || other.st_dev != imported.st_dev) continue;
    ++known.references;
    *id = known_id;
    return CUDA_SUCCESS;
  }
  Physical physical;
  physical.file = fcntl(file, F_DUPFD_CLOEXEC, 0);
  if (physical.file < 0) return CUDA_ERROR_OPERATING_SYSTEM;
  physical.owns_file = true;
  physical.size_bytes = static_cast<std::size_t>(imported.st_size);
  physical.device = device;
  physical.properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  physical.properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  physical.properties.location.id = device;
  physical.properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  *id = next_id_++;
  physical_.emplace(*id, physical);
  return CUDA_SUCCESS;
}

const Physical* VirtualMemory::physical(PhysicalId id) const {
  const auto position = physical_.find(id);
  if (position == physical_.end() || position->second.references == 0) return nullptr;
  return &position->second;
}

CUresult VirtualMemory::map(Address address, std::size_t size_bytes, std::size_t offset_bytes,
                            PhysicalId id) {
  const Physical* found = physical(id);
  if (found == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (size_bytes == 0 || !granular(size_bytes) || !granular(offset_bytes) || !granular(address)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (offset_bytes > found->size_bytes || size_bytes > found->size_bytes - offset_bytes) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  Address base = 0;
  std::size_t reserved = 0;
  if (!find_reservation(address, &base, &reserved)) return CUDA_ERROR_INVALID_VALUE;
  if (size_bytes > base + reserved - address) return CUDA_ERROR_INVALID_VALUE;
  const auto next = mappings_.lower_bound(address + size_bytes);
  if (next != mappings_.begin()) {
    const Mapping& previous = std::prev(next)->second;
    if (previous.address + previous.size_bytes > address) return CUDA_ERROR_INVALID_VALUE;
  }
  // While it has one address its bytes can still move.
  if (found->is_exportable() && found->mappings == 1 && !give_own_file(id)) {
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  if (!addresses_->map_file(address, size_bytes, found->file, found->offset_bytes + offset_bytes,
                            PROT_NONE)) {
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  Mapping mapping;
  mapping.address = address;
  mapping.size_bytes = size_bytes;
  mapping.physical = id;
  mapping.offset_bytes = offset_bytes;
  mapping.device_access.assign(stores_.size(), CU_MEM_ACCESS_FLAGS_PROT_NONE);
  mappings_.emplace(address, std::move(mapping));
  ++physical_.at(id).mappings;
  return CUDA_SUCCESS;
}

bool VirtualMemory::note_alias(Address address, Mapping* first) {
  const PhysicalId id = mappings_.at(address).physical;
  Physical& physical = physical_.at(id);
  if (physical.mappings < 2 || physical.alias_key != 0) return false;
  const auto earlier = std::find_if(mappings_.begin(), mappings_.end(), [&](const auto& entry) {
    return entry.second.physical == id && entry.first != address;
  });
  *first = earlier->second;
  physical.alias_key = next_alias_key_;
  next_alias_key_ += physical.size_bytes;
  ++alias_count_;
  return true;
}

CUresult VirtualMemory::check_unmap(Address address, std::size_t size_bytes) const {
  Address end = address;
  auto position = mappings_.find(address);
  while (end < address + size_bytes) {
    if (position == mappings_.end() || position->first != end) return CUDA_ERROR_INVALID_VALUE;
    end += position->second.size_bytes;
    ++position;
  }
  return size_bytes != 0 && end == address + size_bytes ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

void VirtualMemory::unmap(Address address, std::size_t size_bytes) {
  auto position = mappings_.find(address);
  while (position != mappings_.end() && position->first < address + size_bytes) {
    const PhysicalId id = position->second.physical;
    addresses_->unmap(position->first, position->second.size_bytes);
    position = mappings_.erase(position);
    --physical_.at(id).mappings;
    erase_if_unused(id);
  }
}

CUresult VirtualMemory::set_access(Address address, std::size_t size_bytes, int device,
                                   unsigned access) {
  // Like cuMemUnmap it works on whole mappings; torch sets a segment's access in one call.
  const CUresult whole = check_unmap(address, size_bytes);
  if (whole != CUDA_SUCCESS) return whole;
  for (auto position = mappings_.find(address);
       position != mappings_.end() && position->first < address + size_bytes; ++position) {
    Mapping& mapping = position->second;
    mapping.device_access[static_cast<std::size_t>(device)] = access;
    mapping.access = *std::max_element(mapping.device_access.begin(), mapping.device_access.end());
    if (!addresses_->protect(mapping.address, mapping.size_bytes, to_protection(mapping.access))) {
      return CUDA_ERROR_OUT_OF_MEMORY;
    }
  }
  return CUDA_SUCCESS;
}

const Mapping* VirtualMemory::find_mapping(Address address) const {
  auto position = mappings_.upper_bound(address);
  if (position == mappings_.begin()) return nullptr;
  const Mapping& mapping = std::prev(position)->second;
  return address - mapping.address < mapping.size_bytes ? &mapping : nullptr;
}

bool VirtualMemory::accessible(Address address, std::size_t size_bytes, bool is_write) const {
  const unsigned needed =
      is_write ? CU_MEM_ACCESS_FLAGS_PROT_READWRITE : CU_MEM_ACCESS_FLAGS_PROT_READ;
  const Address end = address + size_bytes;
  while (address < end) {
    const Mapping* mapping = find_mapping(address);
    if (mapping == nullptr || mapping->access < needed) return false;
    address = mapping->address + mapping->size_bytes;
  }
  return true;
}

bool VirtualMemory::find_reservation(Address address, Address* base,
                                     std::size_t* size_bytes) const {
  auto position = reservations_.upper_bound(address);
  if (position == reservations_.begin()) return false;
  --position;
  if (address - position->first >= position->second) return false;
  *base = position->first;
  *size_bytes = position->second;
  return true;
}

}  // namespace spillover::emulator
