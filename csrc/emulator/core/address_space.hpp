// Where device pointers live, and where their bytes live.
//
// Note [Two arenas]: device pointers are addresses inside an arena that is never mapped, so that
// host code which dereferences one gets SIGSEGV, as with a GPU, and nobody else's memory can have
// such an address. The bytes are at the same offset in a second arena, the shadow, of which only
// live parts are mapped. Hence "is this a device pointer" and "where are its bytes" are one
// comparison and one addition.
//
// One object, made with the Machine. to_host and contains may be called by any thread without a
// lock; the rest is guarded by Machine::mutex.
#pragma once

#include <cstddef>
#include <optional>

#include "emulator/core/range_allocator.hpp"
#include "emulator/core/types.hpp"

namespace spillover::emulator {

// What memory is like that the driver hands out.
enum class FreshMemory {
  kPlain,
  kPoisoned,  // 0xFF bytes
  kPhantom,   // of a dry run: costs only the small parts that are written
};

class AddressSpace {
 public:
  AddressSpace();

  bool contains(Address address) const { return address - base_ < size_bytes_; }

  // The address at which the CPU may touch a device pointer's bytes; other pointers as they are.
  Address to_host(Address address) const {
    return contains(address) ? address + shadow_offset_ : address;
  }

  // The device pointer whose bytes lie here; other addresses as they are.
  Address from_host(Address address) const {
    return address - (base_ + shadow_offset_) < size_bytes_ ? address - shadow_offset_ : address;
  }

  // Takes virtual addresses; the shadow stays unmapped. At `hint` if that is free.
  std::optional<Address> take(std::size_t size_bytes, std::size_t alignment, Address hint = 0);
  void give(Address address, std::size_t size_bytes) { ranges_.give(address, size_bytes); }

  // Gives fresh private memory to a range of the shadow.
  bool map_fresh(Address address, std::size_t size_bytes, FreshMemory kind);

  // Shows a part of a file in a range of the shadow, with the protection that mmap takes.
  bool map_file(Address address, std::size_t size_bytes, int file, std::size_t offset_bytes,
                int protection);

  // Moves the bytes of a range that map_fresh mapped to a new file, where other processes can map
  // them too; -1 where that fails. Threads may use the range meanwhile.
  int move_to_file(Address address, std::size_t size_bytes);

  // protection as for mprotect.
  bool protect(Address address, std::size_t size_bytes, int protection);

  void unmap(Address address, std::size_t size_bytes);

 private:
  // A file of 0xFF bytes that fresh memory is a copy-on-write view of, so that poisoning a large
  // allocation costs memory only where it is written. -1 where files in memory are not available.
  int poison_file();

  Address base_ = 0;
  std::size_t size_bytes_ = 0;
  Address shadow_offset_ = 0;  // modulo 2^64
  int poison_file_ = -2;
  RangeAllocator ranges_;
};

}  // namespace spillover::emulator
