// Who touched which bytes last: a map from disjoint address ranges to their last write and the
// reads since then, at most one an actor. Device and pinned memory alike; pageable memory never
// gets here.
//
// Owned by the HazardChecker; guarded by Machine::mutex.
//
// Invariant: segments are disjoint and not empty.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

#include "emulator/core/call_site.hpp"
#include "emulator/core/types.hpp"
#include "emulator/core/vector_clock.hpp"

namespace spillover::emulator {

struct Access {
  const char* name = nullptr;  // interned; nullptr: no access
  ActorId actor = kHostActor;
  Ticket tick = 0;
  std::uint64_t stream_id = 0;
  std::uint64_t order = 0;  // counts all accesses, in the order of the calls
  SiteId site = 0;
  bool is_free = false;   // of a write: it was a stream-ordered free
  bool in_graph = false;  // by a node of a graph
};

enum class AccessKind { kRead, kWrite, kFree };

struct ByteRange {
  Address address = 0;
  std::size_t size_bytes = 0;
};

// An earlier access that a new one is not ordered after.
struct Conflict {
  Access earlier;
  AccessKind earlier_kind = AccessKind::kRead;
  bool reused = false;  // a caching allocator handed the bytes out again in between
};

class AccessMap {
 public:
  // Records an access of [begin, end) and returns true with the first earlier access that conflicts
  // with it and that `clock`, what the accessing actor knows, does not cover. A free counts as a
  // write.
  bool record(Address begin, Address end, AccessKind kind, const Access& access,
              const VectorClock& clock, Conflict* conflict);

  // The same without recording anything.
  bool find_conflict(Address begin, Address end, AccessKind kind, const Access& access,
                     const VectorClock& clock, Conflict* conflict);

  // The first byte of [begin, end) that was not written since `order`; end if there is none.
  Address find_unwritten(Address begin, Address end, std::uint64_t order) const;

  // Repeats what is known of [begin, end) at another place, of which nothing is known.
  void copy(Address begin, Address end, Address place);

  // Forgets [begin, end).
  void clear(Address begin, Address end);

 private:
  struct Segment {
    Address end = 0;
    Access write;
    std::vector<Access> reads;
  };
  using Segments = std::map<Address, Segment>;

  // The segment that is exactly [begin, end), or segments_.end().
  Segments::iterator find_exact(Address begin, Address end);

  // The first segment that ends after begin, cut at begin and end where it sticks out.
  Segments::iterator first_inside(Address begin, Address end);
  void split(Segments::iterator position, Address at);

  bool record_write(Address begin, Address end, const Access& access, const VectorClock& clock,
                    Conflict* conflict);
  bool record_read(Address begin, Address end, const Access& access, const VectorClock& clock,
                   Conflict* conflict);

  // Programs touch the same buffers again and again, so most accesses are to a segment that is
  // exactly there; this finds it without a walk down the tree. Slots are valid while their epoch is
  // epoch_, which changes whenever a segment is erased.
  struct CacheSlot {
    std::uint64_t epoch = 0;
    Segments::iterator segment;
  };
  static constexpr std::size_t kCacheSize = 4096;
  CacheSlot& slot_of(Address begin);
  void erase(Segments::iterator first, Segments::iterator last);

  Segments segments_;
  std::vector<CacheSlot> cache_{kCacheSize};
  std::uint64_t epoch_ = 1;
};

}  // namespace spillover::emulator
