// Where in the files of a durable store everything lies: follows from its shape alone, so that
// nothing of it need be stored. See Note [Files of a durable store] in durable_format.hpp.
//
// Immutable after construction; thread-safe. PRIVATE to tiers/.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "tiers/durable_format.hpp"

namespace spillover {

// Throws ConfigError for entries that no store can have.
void check_entries(const std::vector<DurableEntry>& entries);

class DurableLayout {
 public:
  struct ExtentPlace {
    size_t entry;
    size_t folder;
    std::array<uint64_t, 2> offsets;  // Of slot A and B.
    uint64_t size_bytes;
  };
  // Of all extents of the store.
  struct ExtentRange {
    size_t first;
    size_t count;
  };

  explicit DurableLayout(const DurableShape& shape);

  static constexpr uint64_t kTableOffset = 4096;
  uint64_t record_offset(size_t copy) const { return records_offset_ + copy * 4096; }
  uint64_t manifest_offset(size_t slot) const { return manifests_offset_ + slot * manifest_bytes_; }
  uint64_t manifest_bytes() const { return manifest_bytes_; }  // Of each slot.
  uint64_t file_bytes(size_t folder) const { return file_bytes_[folder]; }

  const std::vector<ExtentPlace>& extents() const { return extents_; }
  const std::vector<DurableEntry>& entries() const { return entries_; }
  const std::string& name_of(size_t extent) const { return entries_[extents_[extent].entry].name; }

  // The entry's number. Throws ConfigError, which names similar ones, where there is none.
  size_t find(std::string_view name) const;
  // The extents of that part of an entry. Throws ConfigError where it is not whole ones.
  ExtentRange part(size_t entry, uint64_t offset, uint64_t size_bytes) const;
  ExtentRange all_of(size_t entry) const { return ranges_[entry]; }

 private:
  uint64_t extent_bytes_max_;
  std::vector<DurableEntry> entries_;
  std::vector<ExtentPlace> extents_;
  std::vector<ExtentRange> ranges_;  // Of each entry.
  std::map<std::string, size_t, std::less<>> numbers_;
  std::vector<uint64_t> file_bytes_;
  uint64_t records_offset_ = 0;
  uint64_t manifests_offset_ = 0;
  uint64_t manifest_bytes_ = 0;
};

}  // namespace spillover
