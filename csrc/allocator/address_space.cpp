#include "allocator/address_space.hpp"

#include <algorithm>
#include <iterator>
#include <utility>

#include "allocator/expect.hpp"
#include "base/check.hpp"

namespace spillover {

AddressSpace::Reservations::const_iterator AddressSpace::reservation_of(
    DeviceAddress address) const {
  const auto after = reservations_.upper_bound(address);
  SPILLOVER_CHECK(after != reservations_.begin(), "an address is in no reservation");
  const auto found = std::prev(after);
  SPILLOVER_CHECK(address < found->second.end(), "an address is in no reservation");
  return found;
}

bool AddressSpace::is_unused(const Reservation& reservation) const {
  const auto gap = gaps_.find(reservation.range.address());
  return gap != gaps_.end() && gap->second == reservation.size_bytes;
}

DeviceAddress AddressSpace::find(const void* owner, size_t size_bytes) {
  auto best = gaps_.end();
  for (const auto& [start, reservation] : reservations_) {
    if (reservation.owner != owner) continue;
    for (auto gap = gaps_.lower_bound(start); gap != gaps_.end() && gap->first < reservation.end();
         ++gap) {
      if (gap->second < size_bytes) continue;
      if (best == gaps_.end() || gap->second < best->second) best = gap;
    }
  }
  if (best != gaps_.end()) return best->first;
  for (auto& [start, reservation] : reservations_) {
    if (reservation.size_bytes < size_bytes || !is_unused(reservation)) continue;
    reservation.owner = owner;
    return start;
  }
  return reserve(owner, size_bytes);
}

DeviceAddress AddressSpace::reserve(const void* owner, size_t size_bytes) {
  const size_t usable_bytes = std::max(size_bytes, reservation_bytes_);
  AddressReservation range(device_, usable_bytes + guard_bytes_);
  const DeviceAddress address = range.address();
  reservations_.emplace(address, Reservation{std::move(range), usable_bytes, owner});
  gaps_.emplace(address, usable_bytes);
  return address;
}

size_t AddressSpace::gap_at(DeviceAddress address) const {
  const auto gap = gaps_.find(address);
  return gap == gaps_.end() ? 0 : gap->second;
}

void AddressSpace::take(DeviceAddress address, size_t size_bytes) {
  const auto gap = gaps_.find(address);
  SPILLOVER_CHECK(gap != gaps_.end() && gap->second >= size_bytes,
                  "addresses that are in use were about to be mapped");
  const size_t rest_bytes = gap->second - size_bytes;
  gaps_.erase(gap);
  if (rest_bytes != 0) gaps_.emplace(address + size_bytes, rest_bytes);
}

void AddressSpace::give(DeviceAddress address, size_t size_bytes) {
  const Reservation& reservation = reservation_of(address)->second;
  const auto after = gaps_.find(address + size_bytes);
  if (after != gaps_.end() && after->first < reservation.end()) {
    size_bytes += after->second;
    gaps_.erase(after);
  }
  const auto next = gaps_.lower_bound(address);
  if (next != gaps_.begin()) {
    const auto before = std::prev(next);
    if (before->first >= reservation.range.address() && before->first + before->second == address) {
      before->second += size_bytes;
      return;
    }
  }
  gaps_.emplace(address, size_bytes);
}

void AddressSpace::lose(DeviceAddress address, size_t size_bytes) {
  reservations_.at(reservation_of(address)->first).lost_bytes += size_bytes;
}

void AddressSpace::abandon_lost() {
  for (auto position = reservations_.begin(); position != reservations_.end();) {
    Reservation& reservation = position->second;
    const auto first = gaps_.lower_bound(position->first);
    const auto behind = gaps_.lower_bound(reservation.end());
    size_t idle_bytes = reservation.lost_bytes;
    for (auto gap = first; gap != behind; ++gap) idle_bytes += gap->second;
    if (reservation.lost_bytes == 0 || idle_bytes != reservation.size_bytes) {
      ++position;
      continue;
    }
    gaps_.erase(first, behind);
    abandoned_.push_back(std::move(reservation.range));
    position = reservations_.erase(position);
  }
}

void AddressSpace::release_unused() {
  abandon_lost();
  for (auto position = reservations_.begin(); position != reservations_.end();) {
    if (!is_unused(position->second)) {
      ++position;
      continue;
    }
    gaps_.erase(position->first);
    position = reservations_.erase(position);
  }
}

AddressSpace::Sums AddressSpace::check_invariants() const {
  Sums sums;
  DeviceAddress end = 0;
  for (const auto& [start, reservation] : reservations_) {
    expect(start == reservation.range.address() && start >= end, "two reservations overlap");
    end = reservation.end();
    sums.reserved_bytes += reservation.size_bytes;
    sums.lost_bytes += reservation.lost_bytes;
  }
  DeviceAddress gap_end = 0;
  for (const auto& [address, size_bytes] : gaps_) {
    const auto after = reservations_.upper_bound(address);
    expect(after != reservations_.begin(), "a gap is in no reservation");
    const Reservation& reservation = std::prev(after)->second;
    expect(size_bytes > 0 && address + size_bytes <= reservation.end(),
           "a gap is in no reservation");
    expect(address >= gap_end, "two gaps overlap");
    expect(address > gap_end || address == reservation.range.address(), "two gaps touch");
    gap_end = address + size_bytes;
    sums.gap_bytes += size_bytes;
  }
  return sums;
}

bool AddressSpace::is_free_of_gaps(DeviceAddress address, size_t size_bytes) const {
  const auto after = gaps_.lower_bound(address + size_bytes);
  if (after == gaps_.begin()) return true;
  const auto& [gap, gap_bytes] = *std::prev(after);
  return gap + gap_bytes <= address;
}

}  // namespace spillover
