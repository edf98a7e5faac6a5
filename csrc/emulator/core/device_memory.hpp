// Memory of each device: its budget, and allocations as cuMemAlloc and cuMemAllocAsync make them.
// (Physical memory made by cuMemCreate is in virtual_memory.hpp and draws on the same budget.)
//
// Owned by the Machine; guarded by Machine::mutex.
//
// Invariant: for each device, used = the sum of charged_bytes of its allocations and physical
// handles, and used <= capacity. What another process occupies may come and go at any time, so used
// and occupied together may exceed the capacity, as long as nothing new is charged then.
#pragma once

#include <cuda.h>

#include <array>
#include <cstddef>
#include <map>

#include "emulator/core/address_space.hpp"
#include "emulator/core/process_file.hpp"
#include "emulator/core/types.hpp"

namespace spillover::emulator {

class Budget {
 public:
  explicit Budget(std::size_t capacity_bytes);

  bool charge(int device, std::size_t size_bytes);
  void refund(int device, std::size_t size_bytes);

  // Sets what another process holds on the device.
  void occupy(int device, std::size_t size_bytes) {
    devices_[index(device)].occupied_bytes = size_bytes;
  }

  std::size_t capacity_bytes() const { return capacity_bytes_; }
  std::size_t used_bytes(int device) const { return devices_[index(device)].used_bytes; }
  std::size_t free_bytes(int device) const;
  std::size_t peak_bytes(int device) const { return devices_[index(device)].peak_bytes; }

 private:
  struct Use {
    std::size_t used_bytes = 0;
    std::size_t peak_bytes = 0;
    std::size_t occupied_bytes = 0;
  };

  static std::size_t index(int device) { return static_cast<std::size_t>(device); }

  std::size_t capacity_bytes_;
  std::array<Use, kDeviceCountMax> devices_;
};

struct Pool;

struct Allocation {
  Address address = 0;
  std::size_t size_bytes = 0;  // as asked for: bytes beyond it are not the program's
  std::size_t charged_bytes =
      0;  // what it takes of the address space, and of the budget if it is our own
  int device = 0;
  Pool* pool = nullptr;       // where cuMemAllocAsync took it from
  bool free_pending = false;  // cuMemFreeAsync was called, its turn has not come

  // Memory that processes share. An exporter's file holds the bytes from its first handle on.
  int file = -1;
  ProcessFile origin;  // of memory of another process: where it is from
  int open_count = 0;  // and how often it was opened; 0 for this process's own

  bool managed_by_pool() const { return pool != nullptr; }
  bool is_imported() const { return open_count > 0; }
};

class DeviceMemory {
 public:
  DeviceMemory(AddressSpace* addresses, Budget* budget, FreshMemory fresh)
      : addresses_(addresses), budget_(budget), fresh_(fresh) {}

  // CUDA_ERROR_OUT_OF_MEMORY when the budget has not enough. size_bytes is not 0.
  CUresult allocate(int device, std::size_t size_bytes, Pool* pool, Address* address);

  // Gives an allocation's bytes a file that other processes can open, if it has none yet.
  CUresult share(Allocation* allocation);

  // Memory of another process, whose file is taken over; open_count is 1 then. Its owner pays for
  // it. CUDA_ERROR_MAP_FAILED where it cannot be mapped.
  CUresult import(int file, const ProcessFile& origin, std::size_t size_bytes, int device,
                  Address* address);

  // What was imported from there already, or nullptr.
  Allocation* find_imported(const ProcessFile& origin);

  // The allocation must exist.
  void free(Address address);

  // The live allocation that contains address, or nullptr.
  Allocation* find(Address address);

  const std::map<Address, Allocation>& allocations() const { return allocations_; }

 private:
  AddressSpace* addresses_;
  Budget* budget_;
  FreshMemory fresh_;
  std::map<Address, Allocation> allocations_;
};

}  // namespace spillover::emulator
