#include "tiers/durable_layout.hpp"

#include <algorithm>
#include <set>

#include "base/bytes.hpp"
#include "base/error.hpp"
#include "base/nearest.hpp"
#include "tiers/extent_space.hpp"

namespace spillover {
namespace {

constexpr size_t kNameBytesMax = 4096;
constexpr uint64_t kEntryBytesMax = uint64_t{1} << 50;
static_assert(DurableLayout::kTableOffset == kDiskBlockBytes);

}  // namespace

void check_entries(const std::vector<DurableEntry>& entries) {
  if (entries.empty()) throw ConfigError("a durable store needs at least one entry");
  std::set<std::string_view> seen;
  for (const DurableEntry& entry : entries) {
    if (entry.name.empty() || entry.name.size() > kNameBytesMax) {
      throw ConfigError("the name of an entry has 1 to " + std::to_string(kNameBytesMax) +
                        " bytes, not " + std::to_string(entry.name.size()));
    }
    if (entry.size_bytes == 0 || entry.size_bytes > kEntryBytesMax) {
      throw ConfigError("the entry '" + entry.name + "' has " + std::to_string(entry.size_bytes) +
                        " bytes; an entry has at least 1");
    }
    if (!seen.insert(entry.name).second) {
      throw ConfigError("two entries have the name '" + entry.name + "'");
    }
  }
}

DurableLayout::DurableLayout(const DurableShape& shape)
    : extent_bytes_max_(shape.extent_bytes_max), entries_(shape.entries) {
  std::vector<uint64_t> slot_bytes(shape.folder_count, 0);  // Of one slot of everything.
  for (size_t entry = 0; entry < entries_.size(); ++entry) {
    numbers_.emplace(entries_[entry].name, entry);
    ranges_.push_back({extents_.size(), 0});
    for (uint64_t left = entries_[entry].size_bytes; left > 0;) {
      const uint64_t next = std::min(left, extent_bytes_max_);
      // The emptiest folder takes it: all get the same to the extent.
      const auto folder = static_cast<size_t>(
          std::min_element(slot_bytes.begin(), slot_bytes.end()) - slot_bytes.begin());
      extents_.push_back({entry, folder, {slot_bytes[folder], 0}, next});
      slot_bytes[folder] += round_up(next, kDiskBlockBytes);
      ++ranges_.back().count;
      left -= next;
    }
  }
  records_offset_ = kTableOffset + encode_table(entries_).size();
  manifests_offset_ = records_offset_ + 2 * kDiskBlockBytes;
  manifest_bytes_ = manifest_bytes_max(extents_.size(), shape.extra_bytes_max);
  std::vector<uint64_t> begins(shape.folder_count, records_offset_);
  begins[0] = manifest_offset(2);
  for (ExtentPlace& extent : extents_) {
    extent.offsets[0] += begins[extent.folder];
    extent.offsets[1] = extent.offsets[0] + slot_bytes[extent.folder];
  }
  for (size_t i = 0; i < begins.size(); ++i) file_bytes_.push_back(begins[i] + 2 * slot_bytes[i]);
}

size_t DurableLayout::find(std::string_view name) const {
  const auto found = numbers_.find(name);
  if (found != numbers_.end()) return found->second;
  std::vector<std::string_view> names;
  for (const DurableEntry& entry : entries_) names.emplace_back(entry.name);
  throw ConfigError("the durable store has no entry '" + std::string(name) + "'; the nearest is '" +
                    std::string(nearest_name(name, names)) + "'");
}

DurableLayout::ExtentRange DurableLayout::part(size_t entry, uint64_t offset,
                                               uint64_t size_bytes) const {
  const DurableEntry& of = entries_[entry];
  const bool is_inside =
      size_bytes > 0 && offset < of.size_bytes && size_bytes <= of.size_bytes - offset;
  if (!is_inside) {
    throw ConfigError("the entry '" + of.name + "' has " + std::to_string(of.size_bytes) +
                      " bytes, so it has no " + std::to_string(size_bytes) + " at offset " +
                      std::to_string(offset));
  }
  const uint64_t end = offset + size_bytes;
  if (offset % extent_bytes_max_ != 0 || (end != of.size_bytes && end % extent_bytes_max_ != 0)) {
    throw ConfigError("a part of the entry '" + of.name + "' begins and ends at a multiple of " +
                      std::to_string(extent_bytes_max_) + " bytes (extent_bytes) or at its end; " +
                      std::to_string(size_bytes) + " bytes at offset " + std::to_string(offset) +
                      " do not");
  }
  const uint64_t first = offset / extent_bytes_max_;
  const uint64_t count = (size_bytes + extent_bytes_max_ - 1) / extent_bytes_max_;
  return {ranges_[entry].first + first, count};
}

}  // namespace spillover
