// Blocks at addresses that are given: the live blocks of a private arena as they once were, and
// single ones.
//
// Graphs that may run after one another are recorded from the same state of their arena: what a
// later recording hands out must not be where an earlier graph's results are. The arena's memory is
// mapped as it was or more, and each of its chunks is in the heap that it was in (Note [Private
// arenas] in pool_arenas.cpp), so the former blocks can be cut out of it once all are free.
#include <algorithm>
#include <iterator>

#include "allocator/pool.hpp"
#include "base/bytes.hpp"
#include "base/check.hpp"
#include "base/error.hpp"

namespace spillover {

void Pool::restore_arena(ArenaId arena, std::vector<spillover_block_info> blocks) {
  const std::lock_guard lock(mutex_);
  static_cast<void>(private_arena(arena));
  check_awake(arena);
  std::sort(blocks.begin(), blocks.end(),
            [](const auto& a, const auto& b) { return a.address < b.address; });
  const std::vector<Block*> live = live_blocks(arena);
  check_restorable(arena, blocks, live);
  take_over_counters();
  for (Block* block : live) {
    count_freed(*block);
    make_free(block);
  }
  for (const spillover_block_info& wanted : blocks) restore(wanted);
  raise_peaks();
  if (settings_.check_every != 0) check_at_intervals();
}

std::vector<Block*> Pool::live_blocks(ArenaId arena) const {
  std::vector<Block*> live;
  for (const auto& [address, first] : segments_) {
    if (first->heap->stream->arena != arena) continue;
    for (Block* block = first; block != nullptr; block = block->next) {
      if (block->state == BlockState::kLive) live.push_back(block);
    }
  }
  return live;
}

// Throws StateError where not every block can be restored; nothing has happened then.
void Pool::check_restorable(ArenaId arena, const std::vector<spillover_block_info>& blocks,
                            const std::vector<Block*>& live) const {
  const auto require = [arena](bool condition, const char* reason) {
    if (condition) return;
    throw StateError("private arena " + std::to_string(arena) + " cannot be restored: " + reason);
  };
  for (const Block* block : live) {
    require(block->uses.empty(), "another stream may still use one of its live blocks");
  }
  DeviceAddress last_end = 0;
  for (const spillover_block_info& wanted : blocks) {
    const auto begin = reinterpret_cast<DeviceAddress>(wanted.address);
    const DeviceAddress end = begin + wanted.size_bytes;
    require(wanted.requested_bytes > 0 && wanted.requested_bytes <= wanted.size_bytes &&
                begin % kBlockAlignment == 0 && wanted.size_bytes % kBlockAlignment == 0 &&
                begin >= last_end && end > begin,
            "the blocks to restore are not such that were live at one time");
    last_end = end;
    const Block* block = block_at(begin);
    require(block != nullptr && block->heap->stream->arena == arena &&
                (block->heap->size_class == SizeClass::kSmall) ==
                    (wanted.size_bytes <= kSmallRequestMax),
            "a block to restore is not in its memory");
    require(!block->heap->stream->is_whole ||
                (block->address == begin && block->size_bytes == wanted.size_bytes),
            "a block to restore is not one of its blocks, which are not split");
    for (; block != nullptr && block->address < end; block = block->next) {
      require(block->state != BlockState::kWaiting,
              "another stream may still use memory of a block to restore");
    }
    // What ended the walk lies behind the block, or it is the segment's end.
    const auto segment = std::prev(segments_.upper_bound(begin));
    const Block* last = segment->second;
    while (last->next != nullptr) last = last->next;
    require(last->end() >= end, "a block to restore is not in its memory");
  }
}

// The block that the address lies in; null where nothing is mapped.
Block* Pool::block_at(DeviceAddress address) const {
  const auto after = segments_.upper_bound(address);
  if (after == segments_.begin()) return nullptr;
  Block* block = std::prev(after)->second;
  while (block != nullptr && block->end() <= address) block = block->next;
  return block;
}

// Cuts a live block out of the free one that it lies in.
void Pool::restore(const spillover_block_info& wanted) {
  const auto address = reinterpret_cast<DeviceAddress>(wanted.address);
  Block* block = block_at(address);
  SPILLOVER_CHECK(block != nullptr && block->state == BlockState::kFree,
                  "a block to restore lies in one that is in use");
  const StreamState& stream = *block->heap->stream;
  cut_out(block, address,
          {wanted.requested_bytes, wanted.size_bytes, stream.key, stream.arena,
           block->heap->size_class});
}

// Hands out what the request asks for at an address in a free block.
void Pool::cut_out(Block* block, DeviceAddress address, const Request& request) {
  remove_free(block);
  if (block->address < address) {
    Request front = request;
    front.size_bytes = address - block->address;
    split(block, front);
    Block* rest = block->next;
    remove_free(rest);
    insert_free(block);
    block = rest;
  }
  split(block, request);
  activate(block, request);
}

void* Pool::allocate_at(void* pointer, ArenaId arena, size_t size_bytes, StreamHandle stream) {
  const auto address = reinterpret_cast<DeviceAddress>(pointer);
  if (address == 0 || address % kBlockAlignment != 0 || size_bytes == 0) {
    throw ConfigError("memory at an address wants a multiple of " +
                      std::to_string(kBlockAlignment) + " and a size above 0, got " +
                      format_address(pointer) + " and " + std::to_string(size_bytes) + " bytes");
  }
  if (arena == kDefaultArena) {
    check_not_capturing(device_, stream);
    arena = ThreadCache::current_arena();
  }
  const Request request = make_request(size_bytes, stream, arena);
  const std::lock_guard lock(mutex_);
  if (is_private_arena(arena)) static_cast<void>(private_arena(arena));
  const Heap& heap = heap_of(request);
  empty_magazines();
  Block* block = block_at(address);
  const DeviceAddress end = address + request.size_bytes;
  const bool is_free = block != nullptr && block->state == BlockState::kFree &&
                       block->heap == &heap && end > address && block->end() >= end &&
                       (!heap.stream->is_whole || block->address == address);
  if (!is_free) {
    throw StateError("there are no " + format_bytes(size_bytes) + " of free memory at " +
                     format_address(pointer) + " that belong to the stream and the pool");
  }
  take_over_counters();
  cut_out(block, address, request);
  raise_peaks();
  if (settings_.check_every != 0) check_at_intervals();
  return pointer;
}

}  // namespace spillover
