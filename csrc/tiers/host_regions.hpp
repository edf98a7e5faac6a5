// Host memory that was pinned ahead, and what is carved from it.
//
// Note [Memory pinned ahead]. Pinning costs more than a copy, so a program may do it once, at its
// start, for all that it will need. Which sizes that will be is not known then. So the memory is a
// few large regions, each one registration (a copy must not cross two), from which blocks of whole
// pages are cut: best fit, the lowest address of equals, and joined with their neighbours when they
// come back. A block takes its size rounded to the page and nothing more, as a mapping of its own
// would; what fits nowhere gets one. A model's state is allocated once and stays, so the holes that
// such a scheme may leave have no time to grow.
//
// Not thread-safe: HostPool's mutex guards it. PRIVATE to tiers/.
#pragma once

#include <cstddef>
#include <map>
#include <optional>
#include <set>
#include <utility>

#include "tiers/host_mapping.hpp"

namespace spillover {

class HostRegions {
 public:
  void add(HostMapping&& mapping);

  // A block of whole pages, or null where there is no hole for it.
  std::byte* take(size_t size_bytes);
  // size_bytes as in take().
  void give_back(std::byte* address, size_t size_bytes);
  bool owns(const std::byte* address) const;

  size_t free_bytes() const { return free_bytes_; }
  // Of all regions, in use or not.
  size_t size_bytes() const { return size_bytes_; }

  // Takes out a region that nothing is carved from, of the least size that is at least
  // wanted_bytes, or else the largest one. Nothing where none is free.
  std::optional<HostMapping> take_free_region(size_t wanted_bytes);

  // Whether the equations below hold.
  bool is_valid() const;

 private:
  using Holes = std::map<std::byte*, size_t>;
  void add_hole(std::byte* address, size_t size_bytes);
  void remove_hole(Holes::iterator hole);
  bool is_free(const HostMapping& region) const;

  // Invariants: holes lie in regions, and no two of them touch within one; free_bytes_ is their
  // sum, by_size_ the same holes; size_bytes_ is the sum of the regions.
  std::map<std::byte*, HostMapping> regions_;
  Holes holes_;
  std::set<std::pair<size_t, std::byte*>> by_size_;
  size_t free_bytes_ = 0;
  size_t size_bytes_ = 0;
};

}  // namespace spillover
