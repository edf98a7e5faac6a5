// The structures of the pool: segments, which the driver gave, cut into blocks.
//
// Owned by one Pool and guarded by its mutex. What holds between calls:
//   - a segment's blocks, followed by `next` from `first`, cover it without gap or overlap;
//   - no two neighbours are both free;
//   - a free block is in exactly one bin, that of its segment's stream and size class, and has
//     requested_bytes 0 and no uses;
//   - a waiting block has outstanding_uses > 0, any other has 0;
//   - addresses and sizes are multiples of kBlockAlignment.
// Pool::check_invariants() walks all of that.
#pragma once

#include <cstddef>
#include <vector>

#include "allocator/stream_key.hpp"
#include "base/bytes.hpp"
#include "driver/device_memory.hpp"

namespace spillover {

inline constexpr size_t kBlockAlignment = 512;
// Requests up to this size are small: they share small segments.
inline constexpr size_t kSmallRequestMax = kMiB;
inline constexpr size_t kSmallSegment = 2 * kMiB;
// Requests from kSmallRequestMax to kMediumRequestMax are cut from segments of this size; larger
// ones get a segment of their own, rounded up to kLargeSegmentUnit.
inline constexpr size_t kMediumRequestMax = 10 * kMiB;
inline constexpr size_t kMediumSegment = 20 * kMiB;
inline constexpr size_t kLargeSegmentUnit = 2 * kMiB;

enum class SizeClass { kSmall, kLarge };

enum class BlockState {
  kFree = 0,
  kLive = 1,
  kWaiting = 2,  // freed, but a noted stream may still use it
};

struct Segment;

struct Block {
  Segment* segment = nullptr;
  DeviceAddress address = 0;
  size_t size_bytes = 0;
  size_t requested_bytes = 0;
  BlockState state = BlockState::kFree;
  // Neighbours in the segment by address.
  Block* previous = nullptr;
  Block* next = nullptr;
  // Streams other than the segment's that were noted while the block was live; no duplicates.
  std::vector<StreamKey> uses;
  // Uses whose completion is not known yet; counted by PendingUses.
  size_t outstanding_uses = 0;

  // Whether the block is a part of its segment, not all of it.
  bool is_split() const { return previous != nullptr || next != nullptr; }
};

struct Segment {
  DeviceMemory memory;
  StreamKey stream;
  SizeClass size_class;
  Block* first = nullptr;

  DeviceAddress address() const { return memory.address(); }
  size_t size_bytes() const { return memory.size_bytes(); }
};

// Best fit: the smallest block first, among equals the lowest address.
struct BySizeThenAddress {
  bool operator()(const Block* a, const Block* b) const {
    if (a->size_bytes != b->size_bytes) return a->size_bytes < b->size_bytes;
    return a->address < b->address;
  }
};

}  // namespace spillover
