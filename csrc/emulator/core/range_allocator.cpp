#include "emulator/core/range_allocator.hpp"

#include <iterator>

namespace spillover::emulator {

std::optional<Address> RangeAllocator::take(std::size_t size_bytes, std::size_t alignment) {
  for (auto position = free_.begin(); position != free_.end(); ++position) {
    const Address address = round_up(position->first, alignment);
    const std::size_t lead = address - position->first;
    if (position->second < lead || position->second - lead < size_bytes) continue;
    carve(position, address, size_bytes);
    return address;
  }
  return std::nullopt;
}

bool RangeAllocator::take_at(Address address, std::size_t size_bytes) {
  auto position = free_.upper_bound(address);
  if (position == free_.begin()) return false;
  --position;
  const std::size_t lead = address - position->first;
  if (position->second < lead || position->second - lead < size_bytes) return false;
  carve(position, address, size_bytes);
  return true;
}

void RangeAllocator::carve(Ranges::iterator position, Address address, std::size_t size_bytes) {
  const Address begin = position->first;
  const Address end = begin + position->second;
  free_.erase(position);
  if (begin < address) free_.emplace(begin, address - begin);
  if (address + size_bytes < end) free_.emplace(address + size_bytes, end - address - size_bytes);
}

void RangeAllocator::give(Address address, std::size_t size_bytes) {
  auto position = free_.emplace(address, size_bytes).first;
  const auto next = std::next(position);
  if (next != free_.end() && address + size_bytes == next->first) {
    position->second += next->second;
    free_.erase(next);
  }
  if (position == free_.begin()) return;
  const auto previous = std::prev(position);
  if (previous->first + previous->second == position->first) {
    previous->second += position->second;
    free_.erase(position);
  }
}

}  // namespace spillover::emulator
