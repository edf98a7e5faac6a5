// CUDA's virtual memory functions: reserved address ranges, physical memory handles, and mappings
// of the one in the other. A handle can be mapped at several places, which then show the same
// bytes.
//
// Note [Physical memory]: a device's physical memory is one sparse file in memory; a handle is a
// range of it, so that thousands of 2 MiB handles need one file descriptor. A handle gets a file of
// its own when it is exported first, since its descriptor must give access to it alone: its bytes
// move there under threads that may be writing to them (Note [Moving under writers]). One that may
// be exported moves before it is mapped a second time, as writers are held off at one address.
//
// Owned by the Machine; guarded by Machine::mutex.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "emulator/core/address_space.hpp"
#include "emulator/core/device_memory.hpp"
#include "emulator/core/types.hpp"

namespace spillover::emulator {

using PhysicalId = std::uint64_t;

struct Physical {
  std::size_t size_bytes = 0;
  std::size_t charged_bytes = 0;  // 0 for imported memory: whoever created it pays
  int device = 0;
  CUmemAllocationProp properties{};
  int file = -1;
  std::size_t offset_bytes = 0;
  bool owns_file = false;
  int references = 1;  // by create, import and retain
  int mappings = 0;
  bool is_imported() const { return charged_bytes == 0; }
  bool is_exportable() const {
    return properties.requestedHandleTypes == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  }

  // Where the checker keeps what happens to these bytes once they are mapped twice; 0 before.
  Address alias_key = 0;
};

// Note [Aliased mappings]: the checker knows bytes by the address that they were touched at. Bytes
// that have two addresses have a key besides, a range outside every address space, where accesses
// through all of their addresses meet. Keys are never used again.
struct AliasKey {
  Address address = 0;
  std::size_t size_bytes = 0;
};

struct Mapping {
  Address address = 0;
  std::size_t size_bytes = 0;
  PhysicalId physical = 0;
  std::size_t offset_bytes = 0;                     // in the physical memory
  unsigned access = CU_MEM_ACCESS_FLAGS_PROT_NONE;  // the widest that any device has
  std::vector<unsigned> device_access;              // indexed by device
};

class VirtualMemory {
 public:
  VirtualMemory(AddressSpace* addresses, Budget* budget, bool poison, int device_count);

  CUresult reserve(std::size_t size_bytes, std::size_t alignment, Address hint, Address* address);
  CUresult free_reservation(Address address, std::size_t size_bytes);

  CUresult create(std::size_t size_bytes, const CUmemAllocationProp& properties, PhysicalId* id);
  CUresult release(PhysicalId id);
  CUresult retain(Address address, PhysicalId* id);
  CUresult export_file(PhysicalId id, int* file);
  CUresult import_file(int file, int device, PhysicalId* id);
  const Physical* physical(PhysicalId id) const;
  int device_of(const Mapping& mapping) const { return physical_.at(mapping.physical).device; }
  unsigned long long handle_types_of(const Mapping& mapping) const {
    return physical_.at(mapping.physical).properties.requestedHandleTypes;
  }

  CUresult map(Address address, std::size_t size_bytes, std::size_t offset_bytes, PhysicalId id);

  // Fails with CUDA_ERROR_INVALID_VALUE unless the range is made of whole mappings.
  CUresult check_unmap(Address address, std::size_t size_bytes) const;
  void unmap(Address address, std::size_t size_bytes);  // after check_unmap

  CUresult set_access(Address address, std::size_t size_bytes, int device, unsigned access);

  // See Note [Aliased mappings].
  bool has_aliases() const { return alias_count_ > 0; }

  // Calls visit(key, address, size_bytes) for each part of a range that has a key.
  template <typename Visit>
  void for_each_alias(Address address, std::size_t size_bytes, Visit&& visit) const {
    const Address end = address + size_bytes;
    auto position = mappings_.upper_bound(address);
    if (position != mappings_.begin()) --position;
    for (; position != mappings_.end() && position->first < end; ++position) {
      const Mapping& mapping = position->second;
      const Address begin = std::max(address, mapping.address);
      const Address stop = std::min(end, mapping.address + mapping.size_bytes);
      const Address key = physical_.at(mapping.physical).alias_key;
      if (key == 0 || begin >= stop) continue;
      visit(key + mapping.offset_bytes + (begin - mapping.address), begin, stop - begin);
    }
  }

  // Gives the bytes mapped here a key if they have several addresses now and had one before; true
  // if so. Then first is their earlier mapping.
  bool note_alias(Address address, Mapping* first);

  // Keys of memory that has gone since the last call.
  std::vector<AliasKey> take_dead_keys() { return std::exchange(dead_keys_, {}); }

  const Mapping* find_mapping(Address address) const;

  // True when every byte is mapped and accessible (writable, where asked).
  bool accessible(Address address, std::size_t size_bytes, bool is_write) const;

  // The reserved range that contains address.
  bool find_reservation(Address address, Address* base, std::size_t* size_bytes) const;

  std::size_t physical_count() const { return physical_.size(); }
  std::size_t mapping_count() const { return mappings_.size(); }
  std::size_t reservation_count() const { return reservations_.size(); }

 private:
  // One device's sparse file and which parts of it are taken; opened at first use.
  struct Store {
    int file = -1;
    std::optional<RangeAllocator> ranges;
  };

  CUresult place(std::size_t size_bytes, Physical* physical);
  void leave_store(const Physical& physical);
  bool give_own_file(PhysicalId id);
  void erase_if_unused(PhysicalId id);
  static void fill_with_poison(const Physical& physical);

  AddressSpace* addresses_;
  Budget* budget_;
  bool poison_;
  std::vector<Store> stores_;
  std::map<Address, std::size_t> reservations_;
  std::unordered_map<PhysicalId, Physical> physical_;
  PhysicalId next_id_ = 0x1000;
  Address next_alias_key_ = Address{1} << 63U;
  std::size_t alias_count_ = 0;  // live handles with a key
  std::vector<AliasKey> dead_keys_;
  std::map<Address, Mapping> mappings_;
};

}  // namespace spillover::emulator
