// The mappings of a pool that serve one buffer each: those in use, and idle ones that wait for the
// next buffer of just their size.
//
// Not thread-safe: HostPool's mutex guards it. PRIVATE to tiers/.
#pragma once

#include <cstddef>
#include <list>
#include <map>
#include <optional>
#include <unordered_map>

#include "tiers/host_mapping.hpp"

namespace spillover {

class HostMappings {
 public:
  // Takes it in, in use. What it throws (std::bad_alloc) leaves the mapping where it was.
  std::byte* add(HostMapping&& mapping);

  // An idle one of just that size, now in use, or null.
  std::byte* take(size_t size_bytes) noexcept;
  bool owns(const std::byte* address) const noexcept { return by_address_.contains(address); }
  // One that was in use; its size. It is idle now. Needs no memory.
  size_t give_back(const std::byte* address) noexcept;

  // Takes out the one that has been idle longest.
  std::optional<HostMapping> take_longest_idle() noexcept;

  size_t size_bytes() const { return size_bytes_; }  // Of all, in use or not.
  size_t idle_bytes() const { return idle_bytes_; }
  size_t huge_page_bytes() const { return huge_page_bytes_; }

 private:
  struct Entry;
  using Entries = std::list<Entry>;
  using IdleBySize = std::multimap<size_t, Entries::iterator>;
  struct Entry {
    HostMapping mapping;
    IdleBySize::node_type by_size;    // While it is in use: what will be its entry there.
    IdleBySize::iterator idle_entry;  // While it is idle.
  };

  // Invariants: by_address_ has all of used_ and idle_, idle_by_size_ those of idle_; idle_bytes_
  // is the sum of idle_, size_bytes_ and huge_page_bytes_ are those of both.
  Entries used_;
  Entries idle_;  // Longest idle first.
  IdleBySize idle_by_size_;
  std::unordered_map<const std::byte*, Entries::iterator> by_address_;
  size_t size_bytes_ = 0;
  size_t idle_bytes_ = 0;
  size_t huge_page_bytes_ = 0;
};

}  // namespace spillover
