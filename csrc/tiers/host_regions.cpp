#include "tiers/host_regions.hpp"

#include <iterator>

#include "base/check.hpp"

namespace spillover {

void HostRegions::add(HostMapping&& mapping) {
  std::byte* const address = mapping.address();
  const size_t size_bytes = mapping.size_bytes();
  const auto piece = pieces_.emplace(address, Piece{size_bytes, {}}).first;
  try {
    holes_.emplace(size_bytes, address);
    // Makes its node before it moves the mapping.
    regions_.try_emplace(address, std::move(mapping));
  } catch (...) {
    holes_.erase({size_bytes, address});
    pieces_.erase(piece);
    throw;
  }
  free_bytes_ += size_bytes;
  size_bytes_ += size_bytes;
  huge_page_bytes_ += regions_.at(address).huge_page_bytes();
}

std::byte* HostRegions::take(size_t size_bytes, HoleEnd end) {
  const auto found = holes_.lower_bound({size_bytes, nullptr});
  if (found == holes_.end()) return nullptr;
  auto piece = pieces_.find(found->second);
  if (const size_t rest_bytes = piece->second.size_bytes - size_bytes; rest_bytes > 0) {
    split(piece, end == HoleEnd::kLow ? size_bytes : rest_bytes);
    if (end == HoleEnd::kHigh) ++piece;
  }
  piece->second.entry = holes_.extract({size_bytes, piece->first});
  free_bytes_ -= size_bytes;
  return piece->first;
}

// Of a free piece two, the first of size_bytes.
void HostRegions::split(Pieces::iterator piece, size_t size_bytes) {
  auto& [address, first] = *piece;
  const size_t rest_bytes = first.size_bytes - size_bytes;
  std::byte* const rest = address + size_bytes;
  const auto added = pieces_.emplace_hint(std::next(piece), rest, Piece{rest_bytes, {}});
  try {
    holes_.emplace(rest_bytes, rest);
  } catch (...) {
    pieces_.erase(added);
    throw;
  }
  auto entry = holes_.extract({first.size_bytes, address});
  entry.value() = {size_bytes, address};
  holes_.insert(std::move(entry));
  first.size_bytes = size_bytes;
}

size_t HostRegions::give_back(std::byte* address) noexcept {
  auto piece = pieces_.find(address);
  SPILLOVER_CHECK(piece != pieces_.end(), "a block came back to regions that it is not of");
  SPILLOVER_CHECK(!piece->second.is_free(), "a block came back twice");
  const size_t size_bytes = piece->second.size_bytes;
  holes_.insert(std::move(piece->second.entry));
  free_bytes_ += size_bytes;
  join_next(piece);
  if (piece != pieces_.begin()) join_next(std::prev(piece));
  return size_bytes;
}

// Regions may lie side by side, but a piece never crosses from one to another.
void HostRegions::join_next(Pieces::iterator piece) noexcept {
  const auto next = std::next(piece);
  if (next == pieces_.end() || !piece->second.is_free() || !next->second.is_free() ||
      begins_region(next->first)) {
    return;
  }
  const size_t next_bytes = next->second.size_bytes;
  holes_.erase({next_bytes, next->first});
  pieces_.erase(next);
  auto entry = holes_.extract({piece->second.size_bytes, piece->first});
  piece->second.size_bytes += next_bytes;
  entry.value().first = piece->second.size_bytes;
  holes_.insert(std::move(entry));
}

bool HostRegions::begins_region(const std::byte* address) const {
  return regions_.contains(address);
}

bool HostRegions::owns(const std::byte* address) const {
  const auto after = regions_.upper_bound(address);
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
  HostMapping region(std::move(best->second));
  regions_.erase(best);
  pieces_.erase(region.address());
  holes_.erase({region.size_bytes(), region.address()});
  free_bytes_ -= region.size_bytes();
  size_bytes_ -= region.size_bytes();
  huge_page_bytes_ -= region.huge_page_bytes();
  return region;
}

bool HostRegions::is_free(const HostMapping& region) const {
  return holes_.contains({region.size_bytes(), region.address()});
}

bool HostRegions::is_valid() const {
  size_t hole_bytes = 0;
  size_t hole_count = 0;
  size_t region_bytes = 0;
  size_t huge_page_bytes = 0;
  for (const auto& [begin, mapping] : regions_) {
    const std::byte* at = begin;
    const std::byte* const end = begin + mapping.size_bytes();
    bool was_free = false;
    while (at < end) {
      const auto piece = pieces_.find(const_cast<std::byte*>(at));
      if (piece == pieces_.end()) return false;
      const bool is_free = piece->second.is_free();
      if (is_free && was_free) return false;
      if (is_free != holes_.contains({piece->second.size_bytes, piece->first})) return false;
      if (is_free) hole_bytes += piece->second.size_bytes;
      if (is_free) ++hole_count;
      was_free = is_free;
      at += piece->second.size_bytes;
    }
    if (at != end) return false;
    region_bytes += mapping.size_bytes();
    huge_page_bytes += mapping.huge_page_bytes();
  }
  return hole_bytes == free_bytes_ && hole_count == holes_.size() && region_bytes == size_bytes_ &&
         huge_page_bytes == huge_page_bytes_;
}

}  // namespace spillover
