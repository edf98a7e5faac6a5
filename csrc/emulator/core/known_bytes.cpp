#include "emulator/core/known_bytes.hpp"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <utility>
#include <vector>

#include "emulator/core/address_space.hpp"

namespace spillover::emulator {

void AddressSet::insert(Address begin, Address end) {
  if (begin >= end) return;
  auto position = runs_.upper_bound(begin);
  if (position != runs_.begin() && std::prev(position)->second >= begin) {
    --position;
    if (position->second >= end) return;
    begin = position->first;
  }
  while (position != runs_.end() && position->first <= end) {
    end = std::max(end, position->second);
    position = runs_.erase(position);
  }
  runs_.emplace_hint(position, begin, end);
}

void AddressSet::erase(Address begin, Address end) {
  if (begin >= end || runs_.empty()) return;
  auto position = runs_.upper_bound(begin);
  if (position != runs_.begin() && std::prev(position)->second > begin) --position;
  while (position != runs_.end() && position->first < end) {
    const auto [from, to] = *position;
    position = runs_.erase(position);
    if (from < begin) runs_.emplace_hint(position, from, begin);
    if (to > end) {
      runs_.emplace_hint(position, end, to);
      return;
    }
  }
}

bool AddressSet::covers(Address begin, Address end) const {
  auto position = runs_.upper_bound(begin);
  if (position == runs_.begin()) return false;
  return std::prev(position)->second >= end;
}

bool AddressSet::intersects(Address begin, Address end) const {
  auto position = runs_.lower_bound(end);
  return position != runs_.begin() && std::prev(position)->second > begin;
}

bool KnownBytes::is_known_locked(Address address, std::size_t size_bytes) const {
  if (addresses_->contains(address)) return device_known_.covers(address, address + size_bytes);
  return !host_unknown_.intersects(address, address + size_bytes);
}

bool KnownBytes::is_known(Address address, std::size_t size_bytes) const {
  if (size_bytes == 0) return true;
  address = addresses_->from_host(address);
  if (!addresses_->contains(address) && unknown_host_runs() == 0) return true;
  const std::lock_guard<std::mutex> guard(mutex_);
  return is_known_locked(address, size_bytes);
}

void KnownBytes::set_locked(Address address, std::size_t size_bytes, bool is_known) {
  const Address end = address + size_bytes;
  const bool is_listed = is_known == addresses_->contains(address);
  AddressSet& listed = addresses_->contains(address) ? device_known_ : host_unknown_;
  if (is_listed) {
    listed.insert(address, end);
  } else {
    listed.erase(address, end);
  }
  unknown_host_runs_.store(host_unknown_.run_count(), std::memory_order_release);
}

void KnownBytes::set(Address address, std::size_t size_bytes, bool is_known) {
  if (size_bytes == 0) return;
  address = addresses_->from_host(address);
  if (is_known && !addresses_->contains(address) && unknown_host_runs() == 0) return;
  const std::lock_guard<std::mutex> guard(mutex_);
  set_locked(address, size_bytes, is_known);
}

void KnownBytes::forget(Address address, std::size_t size_bytes) {
  set(address, size_bytes, !addresses_->contains(address));
}

void KnownBytes::move_bytes(Address destination, Address source, std::size_t size_bytes) const {
  // The ranges may overlap where the program copies within one buffer.
  std::memmove(reinterpret_cast<void*>(addresses_->to_host(destination)),
               reinterpret_cast<const void*>(addresses_->to_host(source)), size_bytes);
}

void KnownBytes::copy(Address destination, Address source, std::size_t size_bytes) {
  if (size_bytes == 0) return;
  const bool from_device = addresses_->contains(source);
  const bool to_device = addresses_->contains(destination);
  std::vector<std::pair<Address, Address>> runs;
  const auto keep = [&](Address begin, Address end) {
    if (begin < end && (from_device || !to_device || end - begin <= kRunBytesMax)) {
      runs.emplace_back(begin, end);
    }
  };
  const std::lock_guard<std::mutex> guard(mutex_);
  if (from_device) {
    device_known_.for_each_run(source, source + size_bytes, keep);
  } else {
    Address known_from = source;
    host_unknown_.for_each_run(source, source + size_bytes, [&](Address begin, Address end) {
      keep(known_from, begin);
      known_from = end;
    });
    keep(known_from, source + size_bytes);
  }
  set_locked(destination, size_bytes, /*is_known=*/false);
  for (const auto& [begin, end] : runs) {
    const Address target = destination + (begin - source);
    move_bytes(target, begin, end - begin);
    set_locked(target, end - begin, /*is_known=*/true);
  }
}

}  // namespace spillover::emulator
