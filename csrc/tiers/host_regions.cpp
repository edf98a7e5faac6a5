#include "tiers/host_regions.hpp"

#include <iterator>

#include "base/check.hpp"

namespace spillover {

void HostRegions::add(HostMapping&& mapping) {
  std::byte* address = mapping.address();
  const size_t size_bytes = mapping.size_bytes();
  regions_.emplace(address, std::move(mapping));
  size_bytes_ += size_bytes;
  add_hole(address, size_bytes);
}

std::byte* HostRegions::take(size_t size_bytes) {
  const auto found = by_size_.lower_bound({size_bytes, nullptr});
  if (found == by_size_.end()) return nullptr;
  const auto [hole_bytes, address] = *found;
  remove_hole(holes_.find(address));
  if (hole_bytes > size_bytes) add_hole(address + size_bytes, hole_bytes - size_bytes);
  return address;
}

void HostRegions::give_back(std::byte* address, size_t size_bytes) {
  SPILLOVER_CHECK(owns(address), "a block came back to regions that it is not of");
  const auto region = std::prev(regions_.upper_bound(address));
  std::byte* const region_end = region->first + region->second.size_bytes();
  std::byte* begin = address;
  std::byte* end = address + size_bytes;
  SPILLOVER_CHECK(end <= region_end, "a block ends outside of its region");
  if (const auto next = holes_.lower_bound(address); next != holes_.end()) {
    SPILLOVER_CHECK(next->first >= end, "a block came back twice");
    if (next->first == end && end != region_end) {
      end += next->second;
      remove_hole(next);
    }
  }
  // Regions may lie side by side, but a hole never crosses from one to another.
  if (const auto after = holes_.lower_bound(address); after != holes_.begin()) {
    const auto previous = std::prev(after);
    SPILLOVER_CHECK(previous->first + previous->second <= address, "a block came back twice");
    if (previous->first + previous->second == address && address != region->first) {
      begin = previous->first;
      remove_hole(previous);
    }
  }
  add_hole(begin, static_cast<size_t>(end - begin));
}

bool HostRegions::owns(const std::byte* address) const {
  const auto after = regions_.upper_bound(const_cast<std::byte*>(address));
  if (after == regions_.begin()) return false;
  const auto& [begin, mapping] = *std::prev(after);
  return address < begin + mapping.size_bytes();
}

std::optional<HostMapping> HostRegions::take_free_region(size_t wanted_bytes) {
  auto best = regions_.end();
  for (auto it = regions_.begin(); it != regions_.end(); ++it) {
    if (!is_free(it->second)) continue;
    if (best == regions_.end()) {
      best = it;
      continue;
    }
    const size_t size_bytes = it->second.size_bytes();
    const size_t best_bytes = best->second.size_bytes();
    const bool is_better = best_bytes < wanted_bytes
                               ? size_bytes > best_bytes
                               : size_bytes >= wanted_bytes && size_bytes < best_bytes;
    if (is_better) best = it;
  }
  if (best == regions_.end()) return std::nullopt;
  remove_hole(holes_.find(best->first));
  size_bytes_ -= best->second.size_bytes();
  std::optional<HostMapping> region(std::move(best->second));
  regions_.erase(best);
  return region;
}

bool HostRegions::is_free(const HostMapping& region) const {
  const auto hole = holes_.find(region.address());
  return hole != holes_.end() && hole->second == region.size_bytes();
}

void HostRegions::add_hole(std::byte* address, size_t size_bytes) {
  holes_.emplace(address, size_bytes);
  by_size_.emplace(size_bytes, address);
  free_bytes_ += size_bytes;
}

void HostRegions::remove_hole(Holes::iterator hole) {
  by_size_.erase({hole->second, hole->first});
  free_bytes_ -= hole->second;
  holes_.erase(hole);
}

bool HostRegions::is_valid() const {
  size_t hole_bytes = 0;
  std::byte* previous_end = nullptr;
  for (const auto& [address, size_bytes] : holes_) {
    if (!by_size_.contains({size_bytes, address}) || !owns(address)) return false;
    const auto region = std::prev(regions_.upper_bound(address));
    if (address + size_bytes > region->first + region->second.size_bytes()) return false;
    if (address == previous_end && address != region->first) return false;
    previous_end = address + size_bytes;
    hole_bytes += size_bytes;
  }
  size_t region_bytes = 0;
  for (const auto& [begin, mapping] : regions_) region_bytes += mapping.size_bytes();
  return hole_bytes == free_bytes_ && by_size_.size() == holes_.size() &&
         region_bytes == size_bytes_;
}

}  // namespace spillover
