// Host memory that was pinned ahead, and what is carved from it.
//
// Note [Memory pinned ahead]. Pinning costs more than a copy, so a program may do it once, at its
// start, for all that it will need. Which sizes that will be is not known then. So the memory is a
// few large regions, each one registration (a copy must not cross two), from which blocks of whole
// pages are cut: best fit, the lowest address of equals, and joined with their neighbours when they
// come back. Slabs come from the far end, so that they do not part what large blocks want. A block
// takes its size rounded to the page and nothing more, as a mapping of its own would; what fits
// nowhere gets one. A model's state is allocated once and stays, so the holes that such a scheme
// may leave have no time to grow. A region is large, since it bounds the block, but well below the
// 512 GiB that NVIDIA's driver refuses to register at once (its table of a registration's pages is
// an allocation of at most 2 GiB), and none can be interrupted.
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

// Where in a hole a block is cut.
enum class HoleEnd { kLow, kHigh };

class HostRegions {
 public:
  // What it throws (std::bad_alloc) leaves the mapping where it was.
  void add(HostMapping&& mapping);

  // A block of whole pages, or null where there is no hole for it.
  std::byte* take(size_t size_bytes, HoleEnd end);
  // A block that take() gave; its size. Needs no memory.
  size_t give_back(std::byte* address) noexcept;
  // Whether it lies in a region.
  bool owns(const std::byte* address) const;

  size_t free_bytes() const { return free_bytes_; }
  size_t largest_free_bytes() const { return holes_.empty() ? 0 : holes_.rbegin()->first; }
  // Of all regions, in use or not.
  size_t size_bytes() const { return size_bytes_; }
  size_t huge_page_bytes() const { return huge_page_bytes_; }

  // Takes out a region that nothing is carved from, of the least size that is at least
  // wanted_bytes, or else the largest one. Nothing where none is free.
  std::optional<HostMapping> take_free_region(size_t wanted_bytes);

  // Whether the equations below hold.
  bool is_valid() const;

 private:
  // By size and address.
  using Holes = std::set<std::pair<size_t, std::byte*>>;
  struct Piece {
    size_t size_bytes;
    Holes::node_type entry;  // While it is in use: what will be its entry in holes_.
    bool is_free() const { return entry.empty(); }
  };
  using Pieces = std::map<std::byte*, Piece>;

  void split(Pieces::iterator piece, size_t size_bytes);
  void join_next(Pieces::iterator piece) noexcept;
  bool begins_region(const std::byte* address) const;
  bool is_free(const HostMapping& region) const;

  // Invariants: pieces cover the regions without gaps, none crosses from one region to another, and
  // no two free ones touch within one; holes_ are the free ones, free_bytes_ their sum; size_bytes_
  // and huge_page_bytes_ are the sums of the regions.
  std::map<const std::byte*, HostMapping> regions_;
  Pieces pieces_;
  Holes holes_;
  size_t free_bytes_ = 0;
  size_t size_bytes_ = 0;
  size_t huge_page_bytes_ = 0;
};

}  // namespace spillover
