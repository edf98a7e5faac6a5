// The structures of the pool: blocks, and the heaps that free ones belong to.
//
// Owned by one Pool and guarded by its mutex. A *segment* is a maximal run of neighbouring blocks
// of one heap over mapped addresses; it grows, shrinks and splits as chunks come and go. In a heap
// of whole blocks (Note [Whole blocks] in pool_arenas.cpp) it is one block. What holds between
// calls:
//   - a segment's blocks, followed by `next` from the first, cover it without gap or overlap, and
//     its bounds are bounds of chunks: a chunk belongs to one heap;
//   - no two neighbours are both free;
//   - a free block is in its heap's set and has requested_bytes 0 and no uses;
//   - a cached block is in one magazine (Note [Magazines] in magazine.hpp);
//   - a waiting block has outstanding_uses > 0, and as many pending uses name it; any other has 0;
//   - addresses and sizes are multiples of kBlockAlignment; a block that is not free is at most
//     kSmallRequestMax in a small heap, and more in a large one;
//   - the table of pages knows exactly the blocks that are not free, and has each page once for
//     every segment that lies in it;
//   - freed_at of a block <= freed_count of its stream, completed_count <= freed_count, and the
//     marks of a stream cover ever more frees, at most freed_count; its freed_ranges likewise.
// So, for each class: live + waiting + cached + free = mapped bytes. And what the counters say:
//   allocation = live; active = live + waiting; requested_bytes = those that live and waiting
//   blocks were asked for; inactive_split = free blocks that are not all of their segment;
//   reserved_bytes = held bytes (backing.hpp); all = small + large; peak >= current.
// Pool::check_invariants() walks all of that, and what backing.hpp, address_space.hpp, magazine.hpp
// and thread_counters.hpp state. Note [Checks at intervals] in pool_check.cpp says when.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <set>
#include <vector>

#include "allocator/stream_key.hpp"
#include "base/bytes.hpp"
#include "driver/event.hpp"
#include "driver/types.hpp"

namespace spillover {

// Blocks of one *arena* share no chunk with those of others: what belongs together, such as the
// weights, can be counted, kept and put aside as a whole. 0 is the arena of whoever names none.
using ArenaId = uint32_t;
inline constexpr ArenaId kDefaultArena = 0;
// From here on arenas are *private*: without a name, see Note [Private arenas] in pool_arenas.cpp.
inline constexpr ArenaId kFirstPrivateArena = ArenaId{1} << 31U;

inline constexpr bool is_private_arena(ArenaId arena) {
  return arena >= kFirstPrivateArena;
}

inline constexpr size_t kBlockAlignment = 512;
// Requests up to this size are small: they share the chunks of a heap of their own, so that no
// small block keeps a large hole apart.
inline constexpr size_t kSmallRequestMax = kMiB;

enum class SizeClass { kSmall, kLarge };
inline constexpr std::array kSizeClasses{SizeClass::kSmall, SizeClass::kLarge};

enum class BlockState : uint8_t {
  kFree = 0,
  kLive = 1,
  kWaiting = 2,  // freed, but a noted stream may still use it
  kCached = 3,   // freed, in a thread's magazine
};

struct Heap;

struct Block {
  Heap* heap = nullptr;
  DeviceAddress address = 0;
  size_t size_bytes = 0;
  size_t requested_bytes = 0;
  // Between live and cached it changes under the lock of a thread's cache, else under the mutex.
  std::atomic<BlockState> state{BlockState::kFree};
  // Neighbours in the segment by address.
  Block* previous = nullptr;
  Block* next = nullptr;
  Block* next_cached = nullptr;  // in a magazine's list
  bool is_shared = false;        // with other processes, while it is live
  // Of a block that is not live: number of the stream's latest free that is a part of it; 0 for
  // memory that was not used since it was mapped.
  uint64_t freed_at = 0;
  // Streams other than the heap's that were noted while the block was live; no duplicates.
  std::vector<DeviceStream> uses;
  // Of a live block: number of the capture in which it was handed out, where graphs reuse what
  // streams were noted on (pending_uses.hpp); else 0.
  uint64_t capture = 0;
  // Uses whose completion is not known yet; counted by PendingUses.
  size_t outstanding_uses = 0;

  DeviceAddress end() const { return address + size_bytes; }
  // Whether the block is a part of its segment, not all of it.
  bool is_split() const { return previous != nullptr || next != nullptr; }
};

// Best fit: the smallest block first, among equals the lowest address.
struct BySizeThenAddress {
  bool operator()(const Block* a, const Block* b) const {
    if (a->size_bytes != b->size_bytes) return a->size_bytes < b->size_bytes;
    return a->address < b->address;
  }
};

struct StreamState;

// Free blocks of one class that belong to one stream and arena.
struct Heap {
  StreamState* stream = nullptr;
  SizeClass size_class = SizeClass::kSmall;
  std::set<Block*, BySizeThenAddress> free;
  size_t free_bytes = 0;
  size_t block_count = 0;
};

// Note [Frees and completion]. A freed block may be used again on its own stream at once, as work
// there is ordered. Another stream, and the host that wants to unmap it, must know that the stream
// has done what was submitted before the free. There is no event for each free: frees are numbered,
// and *one* answer of the driver - the stream is idle, or a mark on it was reached - completes
// every free up to a number. Each arena of a stream numbers its own frees. When marks are recorded:
// Note [Watermarks] in pool_watermarks.cpp.
struct StreamState {
  static constexpr size_t kMarksMax = 64;

  enum class MarkKind {
    kWatermark,  // recorded where memory is freed, or where the stream's user asks for more
    kTail,       // recorded when another stream needs memory: any work may lie behind the frees
  };
  struct Mark {
    Event event;
    uint64_t freed_count;  // frees that it covers
    MarkKind kind;
  };
  struct FreedRange {
    DeviceAddress begin;
    DeviceAddress end;
    uint64_t number;  // of the free
  };

  // Frees are numbered from first_count on.
  StreamState(const StreamKey& stream_key, ArenaId stream_arena, bool is_stream_immortal,
              uint64_t first_count)
      : key(stream_key),
        arena(stream_arena),
        is_immortal(is_stream_immortal),
        freed_count(first_count),
        completed_count(first_count) {
    for (const SizeClass size_class : kSizeClasses) {
      heap(size_class).stream = this;
      heap(size_class).size_class = size_class;
    }
  }
  StreamState(const StreamState&) = delete;
  StreamState& operator=(const StreamState&) = delete;

  Heap& heap(SizeClass size_class) { return heaps[static_cast<size_t>(size_class)]; }
  // Of a private arena that was not released: its memory stays where it is and serves nobody else.
  bool is_private() const { return is_private_arena(arena) && !is_released; }
  // Whether free memory may go to another heap.
  bool serves_others() const { return !is_private() && !is_asleep; }
  size_t block_count() const { return heaps[0].block_count + heaps[1].block_count; }
  size_t free_bytes() const { return heaps[0].free_bytes + heaps[1].free_bytes; }

  const StreamKey key;
  const ArenaId arena;
  const bool is_immortal;    // it never dies, and any thread may ask about it
  bool is_released = false;  // Of a private arena only.
  bool is_whole = false;     // Of a private arena only: each block is a segment.
  bool is_asleep = false;    // Or on the way there or back: Note [Sleep] in pool_sleep.cpp.
  uint64_t freed_count;
  uint64_t completed_count;
  std::deque<Mark> marks;     // Oldest first.
  size_t unmarked_bytes = 0;  // Freed since the newest mark.
  // Frees of the large heap that are not known to be complete, oldest first. Those up to
  // ranges_since are left out, and all of them while the pool serves one stream.
  std::deque<FreedRange> freed_ranges;
  uint64_t ranges_since = 0;
  std::array<Heap, 2> heaps;  // Indexed by SizeClass.
};

}  // namespace spillover
