#include <algorithm>
#include <cstring>
#include <iterator>
#include <utility>

#include "emulator/core/capture.hpp"
#include "emulator/core/execute.hpp"
#include "emulator/core/machine.hpp"

namespace spillover::emulator {

std::map<Address, CaptureMemory::Part>::iterator CaptureMemory::first_overlap(Address address) {
  auto position = parts_.upper_bound(address);
  if (position != parts_.begin()) {
    const auto before = std::prev(position);
    if (before->first + before->second.size_bytes > address) return before;
  }
  return position;
}

std::byte* CaptureMemory::write(Address address, std::size_t size_bytes) {
  auto position = first_overlap(address);
  if (position != parts_.end() && position->first <= address &&
      address + size_bytes <= position->first + position->second.size_bytes) {
    return position->second.bytes.get() + (address - position->first);
  }
  // One part for all that overlaps, so that a tensor lies in one piece.
  Address begin = address;
  Address end = address + size_bytes;
  auto last = position;
  for (; last != parts_.end() && last->first < address + size_bytes; ++last) {
    begin = std::min(begin, last->first);
    end = std::max(end, last->first + last->second.size_bytes);
  }
  Part part{end - begin, std::make_unique<std::byte[]>(end - begin)};
  if (machine_->is_live(begin, end - begin, /*is_write=*/false)) {
    std::memcpy(part.bytes.get(), reinterpret_cast<const void*>(machine_->addresses.to_host(begin)),
                end - begin);
  }
  for (auto old = position; old != last; ++old) {
    std::memcpy(part.bytes.get() + (old->first - begin), old->second.bytes.get(),
                old->second.size_bytes);
    replaced_.push_back(std::move(old->second.bytes));  // somebody may still work on it
  }
  parts_.erase(position, last);
  const auto made = parts_.emplace(begin, std::move(part)).first;
  return made->second.bytes.get() + (address - begin);
}

const std::byte* CaptureMemory::read(Address address, std::size_t size_bytes) {
  const auto position = first_overlap(address);
  if (machine_->addresses.contains(address) && position != parts_.end() &&
      position->first < address + size_bytes) {
    return write(address, size_bytes);
  }
  return reinterpret_cast<const std::byte*>(machine_->addresses.to_host(address));
}

void CaptureMemory::apply(const Copy& copy) {
  if (!machine_->addresses.contains(copy.destination)) return;  // the host's memory stays as it is
  // In this order: both may make one part of several, and bytes that were replaced can still be
  // read, but are lost to write to.
  const std::byte* const from = read(copy.source, copy.source_bytes());
  std::byte* const to = write(copy.destination, copy.destination_bytes());
  for (std::size_t row = 0; row < copy.height; ++row) {
    std::memmove(to + row * copy.destination_pitch, from + row * copy.source_pitch,
                 copy.width_bytes);
  }
}

void CaptureMemory::apply(const Fill& fill) {
  if (!machine_->addresses.contains(fill.destination)) return;
  std::byte* row = write(fill.destination, fill.destination_bytes());
  for (std::size_t y = 0; y < fill.height; ++y, row += fill.pitch) fill_bytes(row, fill);
}

}  // namespace spillover::emulator
