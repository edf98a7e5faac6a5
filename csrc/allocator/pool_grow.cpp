// How a heap without a fit gets memory: from the cache, from other heaps, or from the driver.
//
// Note [Growing]. In this order, as each costs less or keeps less memory than the next:
//   1. cached chunks are mapped. Where a large block is to come, what is free already counts: the
//      free block is chosen behind which the least is missing, with the gaps and free blocks that
//      follow it;
//   2. whole chunks of a large enough free block of another heap change hands where they are, which
//      takes no driver call;
//   3. a few new chunks are made, as long as little more is held than was ever in use: to move
//      chunks costs a quarter of making them, but may have to be done again in each cycle of the
//      program, and a program that grows will need the new ones anyway;
//   4. idle chunks anywhere are unmapped and mapped side by side: no fragmentation of free memory
//      stands in the way of a large block as long as whole chunks are free;
//   5. new chunks are made, as many as idle ones do not cover.
// No step hands out much larger chunks than are asked for, which one small block would keep busy.
// Steps 2 and 4 ask for proof that the work on those chunks is complete, and do not wait for it.
#include <algorithm>
#include <bit>
#include <iterator>
#include <limits>

#include "allocator/page_table.hpp"
#include "allocator/pool.hpp"
#include "allocator/statistics.hpp"
#include "base/check.hpp"
#include "base/error.hpp"
#include "driver/stream.hpp"

namespace spillover {
namespace {

// Growing by a little more than is needed saves driver calls: by this share of what is held, at
// most this much.
constexpr size_t kGrowthShare = 256;
constexpr size_t kGrowthMax = 16 * kMiB;

// More is held than was ever in use by at most this share before idle chunks are moved.
constexpr size_t kSpareShare = 256;

// Sizes of chunks where addresses are fixed: small and medium requests share theirs.
constexpr size_t kFixedSmall = 2 * kMiB;
constexpr size_t kMediumRequestMax = 10 * kMiB;
constexpr size_t kFixedMedium = 20 * kMiB;

constexpr uint64_t kEveryFree = std::numeric_limits<uint64_t>::max();

// Chunks that are this many times larger than what is asked for are not taken.
constexpr size_t kOvershootMax = 4;

}  // namespace

// The size of the chunk that is made for a request where addresses are fixed.
size_t Pool::preferred_fixed_bytes(const Request& request) const {
  if (!request.is_whole) {
    if (request.size_bytes <= kSmallRequestMax) return kFixedSmall;
    if (request.size_bytes < kMediumRequestMax) return kFixedMedium;
  }
  return round_up(request.size_bytes, backing_.unit_bytes());
}

// Null when the source has not enough. Gives a block that is in no heap's set.
Block* Pool::grow(const Request& request, Source source) {
  if (heap_of(request).stream->has_upstream) return nullptr;
  const CountOnExit count(*this);
  Block* block = nullptr;
  if (backing_.is_virtual()) {
    const size_t peak = std::max(used_bytes_peak_, used_bytes() + request.size_bytes);
    block = grow_virtual(request, source, spare_bytes(peak));
    if (block != nullptr) used_bytes_peak_ = peak;
  } else {
    block = steal(request);  // What was in use when it was asked last may be idle now.
    if (block == nullptr && source == Source::kNew) block = grow_fixed(request);
  }
  if (backing_.cached_bytes() > settings_.unmapped_max_bytes) {
    backing_.release_cached(backing_.cached_bytes() - settings_.unmapped_max_bytes);
  }
  if (block != nullptr) remove_free(block);
  return block;
}

Block* Pool::grow_virtual(const Request& request, Source source, size_t spare_bytes) {
  if (request.size_bytes > device_bytes_) return nullptr;
  Heap& heap = heap_of(request);
  const Window window = find_window(heap, request.size_bytes);
  const size_t room = source == Source::kNew ? room_bytes() : spare_bytes;
  if (backing_.cached_bytes() < window.missing_bytes) {
    if (Block* block = steal(request)) return block;
    const size_t wanted_bytes = window.missing_bytes - backing_.cached_bytes();
    const size_t moved_bytes = wanted_bytes - std::min(wanted_bytes, spare_bytes);
    const size_t idle_bytes = gather_idle(moved_bytes, window.range, Overshoot::kBounded);
    if (idle_bytes + room < wanted_bytes) return nullptr;
  }
  const size_t held_max = backing_.held_bytes() + room;
  Block* block = window.first;
  if (block == nullptr) {
    const DeviceAddress address = backing_.find_gap(&heap, window.missing_bytes);
    block = map_behind(heap, address, window.missing_bytes, held_max);
  }
  while (block != nullptr && block->size_bytes < request.size_bytes) {
    const size_t missing_bytes =
        round_up(request.size_bytes - block->size_bytes, backing_.unit_bytes());
    const size_t gap_bytes = backing_.gap_at(block->end());
    block = map_behind(heap, block->end(), std::min(missing_bytes, gap_bytes), held_max);
  }
  if (block != nullptr || spare_bytes == 0) return block;
  return grow_virtual(request, source, 0);  // The driver has no more: moving is what is left.
}

// Maps at the start of a gap, generously where that needs new chunks. Gives the free block that
// this becomes a part of, null where memory does not suffice.
Block* Pool::map_behind(Heap& heap, DeviceAddress address, size_t size_bytes, size_t held_max) {
  const size_t room = held_max - std::min(held_max, backing_.held_bytes());
  std::optional<AddressRange> range;
  if (const size_t generous_bytes = generous_growth(heap, size_bytes);
      generous_bytes <= std::min(backing_.gap_at(address), room)) {
    range = backing_.map(address, generous_bytes, room);
  }
  if (!range) range = backing_.map(address, size_bytes, room);
  return range ? adopt(heap, *range, 0) : nullptr;
}

Block* Pool::grow_fixed(const Request& request) {
  const size_t preferred_bytes = preferred_fixed_bytes(request);
  const size_t least_bytes = round_up(request.size_bytes, backing_.unit_bytes());
  std::optional<AddressRange> range;
  if (preferred_bytes <= room_bytes()) range = backing_.allocate(preferred_bytes);
  if (!range && least_bytes < preferred_bytes && least_bytes <= room_bytes()) {
    range = backing_.allocate(least_bytes);
  }
  return range ? adopt(heap_of(request), *range, 0) : nullptr;
}

// What is in no heap's set, or kept for a private or sleeping arena, and in no cache. Magazines are
// empty. Upstreams' memory is not counted here: no chunks are moved for it.
size_t Pool::used_bytes() const {
  size_t bytes = backing_.mapped_bytes() - backing_.upstream_bytes();
  for (const auto& [key, stream] : streams_) {
    if (stream.serves_others()) bytes -= stream.free_bytes();
  }
  return bytes;
}

// What may be taken from the driver so that idle chunks stay where they are.
size_t Pool::spare_bytes(size_t used_bytes_peak) const {
  const size_t held_max = used_bytes_peak + used_bytes_peak / kSpareShare;
  const size_t held_bytes = backing_.held_bytes() - backing_.upstream_bytes();
  const size_t spare_bytes = held_max - std::min(held_max, held_bytes);
  return std::min(spare_bytes, room_bytes()) / backing_.unit_bytes() * backing_.unit_bytes();
}

// What a large heap that needs new chunks grows by. Small heaps grow by what is needed: a chunk
// there is rarely idle again. So do those of whole blocks, where the rest would be a block.
size_t Pool::generous_growth(const Heap& heap, size_t missing_bytes) const {
  if (heap.size_class == SizeClass::kSmall || heap.stream->is_whole ||
      backing_.cached_bytes() >= missing_bytes) {
    return missing_bytes;
  }
  const size_t unit_bytes = backing_.unit_bytes();
  const size_t share_bytes = std::min(backing_.held_bytes() / kGrowthShare, kGrowthMax);
  return std::max(missing_bytes, std::bit_floor(share_bytes) / unit_bytes * unit_bytes);
}

// Where the least has to be mapped. Small blocks are not worth the search: a chunk holds several.
// Whole blocks do not grow.
Pool::Window Pool::find_window(const Heap& heap, size_t size_bytes) const {
  Window best;
  best.missing_bytes = round_up(size_bytes, backing_.unit_bytes());
  if (heap.size_class == SizeClass::kSmall || heap.stream->is_whole) return best;
  for (Block* block : heap.free) {
    const size_t missing_bytes = missing_behind(*block, size_bytes);
    if (missing_bytes >= best.missing_bytes) continue;
    best = {block, {block->address, block->address + size_bytes}, missing_bytes};
  }
  return best;
}

// What has to be mapped behind a free block until it has size_bytes, with the free blocks that it
// meets; more than anything where something in use is in the way.
size_t Pool::missing_behind(const Block& first, size_t size_bytes) const {
  constexpr size_t kNever = std::numeric_limits<size_t>::max();
  size_t have_bytes = first.size_bytes;
  size_t missing_bytes = 0;
  for (const Block* last = &first; have_bytes < size_bytes;) {
    if (last->next != nullptr) return kNever;
    const size_t gap_bytes = backing_.gap_at(last->end());
    const size_t rest_bytes = round_up(size_bytes - have_bytes, backing_.unit_bytes());
    if (gap_bytes >= rest_bytes) return missing_bytes + rest_bytes;
    const auto behind = segments_.find(last->end() + gap_bytes);
    if (gap_bytes == 0 || behind == segments_.end()) return kNever;
    last = behind->second;
    if (last->heap != first.heap || last->state != BlockState::kFree) return kNever;
    have_bytes += gap_bytes + last->size_bytes;
    missing_bytes += gap_bytes;
  }
  return missing_bytes;
}

// Whether every free of the stream is known to be complete. Asks the driver once.
bool Pool::prove_idle(StreamState& stream) {
  collect_marks(stream);
  if (stream.completed_count == stream.freed_count) return true;
  if (!may_ask(stream)) return false;
  if (stream_activity(device_, stream.key.handle) != StreamActivity::kIdle) return false;
  complete_frees(stream, stream.freed_count);
  return true;
}

// A free block of another heap whose chunks can serve the request as they lie. On the same stream
// work is ordered, on others it must be complete; a private arena's memory may be used by graphs,
// which are not ordered with the stream.
Block* Pool::steal(const Request& request) {
  StreamState& own = state_of(request.stream, request.arena);
  for (Heap& heap : own.heaps) {
    // Chunks of a private arena stay in their heap: pool_restore.cpp relies on it.
    if (own.is_private() || heap.size_class == request.size_class) continue;
    if (Block* block = steal_from(heap, request)) return block;
  }
  for (auto& [key, stream] : streams_) {
    if (&stream == &own || !stream.serves_others() || stream.free_bytes() < request.size_bytes) {
      continue;
    }
    prove_idle(stream);
    for (Heap& heap : stream.heaps) {
      if (Block* block = steal_from(heap, request)) return block;
    }
  }
  return nullptr;
}

Block* Pool::steal_from(Heap& victim, const Request& request) {
  const bool same_arena = victim.stream->arena == request.arena;
  const bool same_stream =
      victim.stream->key == request.stream &&
      (same_arena || !(is_private_arena(victim.stream->arena) || is_private_arena(request.arena)));
  const auto run =
      find_run(victim, request, same_stream ? kEveryFree : victim.stream->completed_count);
  if (!run) return nullptr;
  Heap& heap = heap_of(request);
  uint64_t freed_at = 0;
  if (same_stream) {
    // Frees of another arena have other numbers: there the change of hands counts as a free.
    freed_at = same_arena ? run->block->freed_at : ++heap.stream->freed_count;
  }
  announce(SegmentChange::kGoing, victim, run->chunks);
  carve(run->block, run->chunks);
  return adopt(heap, run->chunks, freed_at);
}

// Chunks of a free block that can serve the request as they lie, once the heap's stream has
// completed its frees up to that number.
std::optional<Pool::Run> Pool::find_run(const Heap& victim, const Request& request,
                                        uint64_t completed_count) const {
  Block wanted;
  wanted.size_bytes = request.size_bytes;
  const size_t unit_bytes = backing_.unit_bytes();
  const size_t needed_bytes = backing_.is_virtual() ? round_up(request.size_bytes, unit_bytes)
                                                    : preferred_fixed_bytes(request);
  for (auto position = victim.free.lower_bound(&wanted); position != victim.free.end();
       ++position) {
    for (const AddressRange& part : complete_parts(**position, completed_count)) {
      const AddressRange chunks = backing_.chunks_within(part);
      if (chunks.size_bytes() < request.size_bytes) continue;
      const AddressRange taken = backing_.first_chunks(chunks, request.size_bytes);
      if (taken.size_bytes() > kOvershootMax * needed_bytes) continue;
      return Run{*position, taken};
    }
  }
  return std::nullopt;
}

// Takes idle chunks away from their addresses: of the streams that need the fewest questions first.
// Gives how much it has taken. kept stays where it is.
size_t Pool::gather_idle(size_t wanted_bytes, const AddressRange& kept, Overshoot overshoot) {
  size_t gathered_bytes = 0;
  for (auto& [key, stream] : streams_) {
    if (gathered_bytes >= wanted_bytes) break;
    if (!stream.serves_others() || stream.free_bytes() < backing_.unit_bytes()) continue;
    prove_idle(stream);
    for (Heap& heap : stream.heaps) {
      if (gathered_bytes >= wanted_bytes) break;
      gathered_bytes += evict(heap, wanted_bytes - gathered_bytes, kept, overshoot);
    }
  }
  return gathered_bytes;
}

// Small free blocks go first: the large ones are worth more where they are.
size_t Pool::evict(Heap& heap, size_t wanted_bytes, const AddressRange& kept, Overshoot overshoot) {
  Block least;
  least.size_bytes = backing_.unit_bytes();
  // Carving changes the set: the candidates are noted first. Of one block the last comes first, so
  // that the block is still what is left of it at its turn.
  std::vector<Run> candidates;
  size_t candidate_bytes = 0;
  for (auto position = heap.free.lower_bound(&least);
       position != heap.free.end() && candidate_bytes < wanted_bytes; ++position) {
    const DeviceAddress begin = (*position)->address;
    if (begin >= kept.begin && begin < kept.end) continue;
    const auto parts = complete_parts(**position, heap.stream->completed_count);
    for (auto part = parts.rbegin(); part != parts.rend() && candidate_bytes < wanted_bytes;
         ++part) {
      const AddressRange chunks = backing_.chunks_within(*part);
      const size_t chunk_bytes =
          backing_.first_chunks(chunks, wanted_bytes - candidate_bytes).size_bytes();
      if (chunk_bytes == 0) continue;
      if (overshoot == Overshoot::kBounded && chunk_bytes > kOvershootMax * wanted_bytes) continue;
      candidates.push_back({*position, chunks});
      candidate_bytes += chunk_bytes;
    }
  }
  size_t evicted_bytes = 0;
  for (const Run& candidate : candidates) {
    const AddressRange chunks =
        backing_.first_chunks(candidate.chunks, wanted_bytes - evicted_bytes);
    unmap(candidate.block, chunks);
    evicted_bytes += chunks.size_bytes();
  }
  return evicted_bytes;
}

// A chunk that the driver fails to unmap goes all the same: whether it did its work before the
// error is not known, and memory that may be gone must never be handed out.
void Pool::unmap(Block* block, const AddressRange& chunks) {
  announce(SegmentChange::kGoing, *block->heap, chunks);
  try {
    backing_.unmap(chunks);
  } catch (const Error&) {
    if (backing_.is_mapped(chunks.begin)) {
      announce(SegmentChange::kMapped, *block->heap, chunks);
    } else {
      carve(block, chunks);
    }
    throw;
  }
  carve(block, chunks);
}

// Takes chunks out of a free block and out of the pool's structures; what is left of the block on
// either side stays free.
void Pool::carve(Block* block, const AddressRange& chunks) {
  Heap& heap = *block->heap;
  remove_free(block);
  Block* const next = block->next;
  const AddressRange behind{chunks.end, block->end()};
  if (behind.size_bytes() != 0) {
    Block* rest = make_block(heap, behind, block->freed_at);
    rest->next = next;
    if (next != nullptr) next->previous = rest;
    segments_.emplace(behind.begin, rest);
    insert_free(rest);
  } else if (next != nullptr) {
    next->previous = nullptr;
    segments_.emplace(behind.begin, next);
  }
  const auto size_class = static_cast<size_t>(heap.size_class);
  if (behind.size_bytes() != 0 || next != nullptr) ++segment_counts_[size_class];
  block->next = nullptr;
  if (block->address < chunks.begin) {
    block->size_bytes = chunks.begin - block->address;
    insert_free(block);
  } else {
    if (block->previous != nullptr) {
      block->previous->next = nullptr;
    } else {
      segments_.erase(block->address);
      --segment_counts_[size_class];
    }
    erase_block(block);
  }
  mapped_bytes_[size_class] -= chunks.size_bytes();
  arenas_[heap.stream->arena].mapped_bytes -= chunks.size_bytes();
  PageTable::instance().erase(chunks.begin, chunks.end);
}

// The last block of the segment that ends at the address, where that is the heap's.
Block* Pool::last_block_before(const Heap& heap, DeviceAddress address) const {
  const auto after = segments_.lower_bound(address);
  if (after == segments_.begin()) return nullptr;
  Block* block = std::prev(after)->second;
  if (block->heap != &heap) return nullptr;
  while (block->next != nullptr) block = block->next;
  return block->end() == address ? block : nullptr;
}

// Makes a range of whole chunks a free block of the heap, merged with its neighbours unless its
// blocks stay whole.
Block* Pool::adopt(Heap& heap, const AddressRange& range, uint64_t freed_at) {
  const auto size_class = static_cast<size_t>(heap.size_class);
  Block* block = make_block(heap, range, freed_at);
  mapped_bytes_[size_class] += range.size_bytes();
  ArenaUsage& usage = arenas_[heap.stream->arena];
  usage.mapped_bytes += range.size_bytes();
  usage.mapped_bytes_peak = std::max(usage.mapped_bytes_peak, usage.mapped_bytes);
  if (freed_at > heap.stream->completed_count) note_freed(heap, range);
  // Chunks at fixed addresses may share a page.
  const bool is_mapped = backing_.is_virtual() && !heap.stream->has_upstream;
  const bool is_sparse = heap.size_class == SizeClass::kLarge && is_mapped;
  PageTable::instance().insert(range.begin, range.end, this,
                               is_sparse ? PageKind::kSparse : PageKind::kDense);
  ++segment_counts_[size_class];
  segments_.emplace(range.begin, block);
  // Fixed chunks stay apart: each is an allocation of its own for the driver.
  if (is_mapped && !heap.stream->is_whole) {
    if (Block* previous = last_block_before(heap, range.begin)) {
      if (previous->state == BlockState::kFree) remove_free(previous);
      segments_.erase(range.begin);
      --segment_counts_[size_class];
      previous->next = block;
      block->previous = previous;
      if (previous->state == BlockState::kFree) {
        absorb_next(previous);
        block = previous;
      }
    }
    const auto behind = segments_.find(range.end);
    if (behind != segments_.end() && behind->second->heap == &heap) {
      Block* next = behind->second;
      if (next->state == BlockState::kFree) remove_free(next);
      segments_.erase(behind);
      --segment_counts_[size_class];
      block->next = next;
      next->previous = block;
      if (next->state == BlockState::kFree) absorb_next(block);
    }
  }
  insert_free(block);
  announce(SegmentChange::kMapped, heap, range);
  return block;
}

// What the pool may still take from the driver.
size_t Pool::room_bytes() const {
  const size_t limit = limit_by_settings();
  return limit - std::min(limit, backing_.held_bytes() + asked_of_upstreams_bytes_);
}

// Brings the counters of segments and reserved bytes up to date; cached chunks count as large.
void Pool::count_memory() {
  constexpr auto kSmall = static_cast<size_t>(SizeClass::kSmall);
  const size_t small_bytes = mapped_bytes_[kSmall] - asleep_bytes_[kSmall];
  set_current(statistics_.reserved_bytes, small_bytes, backing_.held_bytes() - small_bytes);
  set_current(statistics_.segment, segment_counts_[static_cast<size_t>(SizeClass::kSmall)],
              segment_counts_[static_cast<size_t>(SizeClass::kLarge)]);
}

}  // namespace spillover
