// Hands out non-overlapping ranges of a fixed span, lowest fitting address first, and merges what
// comes back. Used for virtual addresses and for places in a device's physical memory file.
//
// Not thread-safe: guarded by Machine::mutex (Note [One lock]).
//
// Invariant: free_ holds disjoint ranges, no two of which touch.
#pragma once

#include <cstddef>
#include <map>
#include <optional>

#include "emulator/core/types.hpp"

namespace spillover::emulator {

class RangeAllocator {
 public:
  RangeAllocator(Address base, std::size_t size_bytes) { free_.emplace(base, size_bytes); }

  // alignment is a power of two.
  std::optional<Address> take(std::size_t size_bytes, std::size_t alignment);

  // The range at exactly this place; false if a part of it is taken.
  bool take_at(Address address, std::size_t size_bytes);

  void give(Address address, std::size_t size_bytes);

 private:
  using Ranges = std::map<Address, std::size_t>;

  // Cuts [address, address + size_bytes) out of the free range at position.
  void carve(Ranges::iterator position, Address address, std::size_t size_bytes);

  Ranges free_;
};

}  // namespace spillover::emulator
