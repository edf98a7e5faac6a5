// The memory of a tag goes to the driver and keeps its addresses; pool_wake.cpp brings it back.
//
// Note [Sleep]. Blocks, segments and heaps of a tag that sleeps stay as they are; its chunks have
// no memory (Note [Chunks that sleep] in backing.hpp). So a free is what it always is, and nothing
// else of the pool touches its heaps: they serve no requests, which fail with StateError, and no
// other heap (StreamState::serves_others), and its magazines are closed. Private arenas that were
// made under a tag sleep and wake with it.
//
// A sleep waits for the device and its peers, as any stream may use a live block, then copies live
// blocks out piece by piece, and unmaps what is copied while the next pieces are under way. The
// unmapped memory goes to the driver only when everything is copied: until then a failure is undone
// by mapping it again, which needs no copy and no memory. Where even that fails the tag stays
// asleep, with its contents in device memory, and a waking tries again.
//
// A waking maps and copies piece by piece in the same manner; what was saved is kept until
// everything is in its place. A failure takes the memory away again.
//
// Nobody may use memory of the tag from the call of sleep() to the end of wake(), but anybody may
// free blocks of it: a block's saved pieces are given up when no live block is left in them, its
// chunks are not mapped again. The mutex is released while copies run.
#include <algorithm>
#include <iterator>
#include <string>
#include <utility>

#include "allocator/arenas.hpp"
#include "allocator/pool.hpp"
#include "base/error.hpp"
#include "driver/context.hpp"
#include "trace/span.hpp"

namespace spillover {
namespace {

// Pieces that are on the way at once: enough to keep a link busy while chunks are unmapped.
constexpr size_t kAheadMax = 4;

// Calls action(piece, bytes) for each piece that has bytes of the range.
template <class Action>
void for_each_overlap(const std::vector<ContentPiece>& pieces, const AddressRange& range,
                      Action action) {
  auto piece = std::upper_bound(pieces.begin(), pieces.end(), range.begin,
                                [](DeviceAddress address, const ContentPiece& candidate) {
                                  return address < candidate.parts.back().end();
                                });
  for (; piece != pieces.end() && piece->parts.front().address < range.end; ++piece) {
    size_t bytes = 0;
    for (const ContentPart& part : piece->parts) {
      const DeviceAddress begin = std::max(part.address, range.begin);
      const DeviceAddress end = std::min(part.end(), range.end);
      if (begin < end) bytes += end - begin;
    }
    if (bytes != 0) action(static_cast<size_t>(piece - pieces.begin()), bytes);
  }
}

}  // namespace

ArenaId Pool::tag_of(ArenaId arena) const {
  if (!is_private_arena(arena)) return arena;
  const auto found = tags_.find(arena);
  return found == tags_.end() ? kDefaultArena : found->second;
}

bool Pool::is_asleep(ArenaId arena) const {
  return !sleeping_.empty() && sleeping_.count(tag_of(arena)) != 0;
}

void Pool::check_awake(ArenaId arena) const {
  if (!is_asleep(arena)) return;
  const std::string name = arena_name(tag_of(arena));
  throw StateError("memory with the tag '" + name + "' sleeps on device " +
                   std::to_string(device_) + "; wake it before more is allocated");
}

std::vector<ArenaId> Pool::sleeping_tags() const {
  const std::lock_guard lock(mutex_);
  std::vector<ArenaId> tags;
  for (const auto& [tag, sleeping] : sleeping_) tags.push_back(tag);
  return tags;
}

// Closes or opens everything of a tag.
void Pool::set_asleep(ArenaId tag, bool is_asleep) {
  if (is_asleep) {
    sleeping_[tag];
  } else {
    sleeping_.erase(tag);
  }
  for (auto& [key, stream] : streams_) {
    if (tag_of(stream.arena) == tag) stream.is_asleep = is_asleep;
  }
  for (const MagazineReference& reference : magazines_) {
    if (tag_of(reference.slot->stream->arena) != tag) continue;
    if (is_asleep) {
      std::vector<Block*> blocks;
      {
        const std::lock_guard lock(reference.cache->lock);
        reference.slot->magazine.set_closed(true);
        reference.slot->magazine.empty(blocks);
      }
      return_cached(blocks);
    } else {
      const std::lock_guard lock(reference.cache->lock);
      reference.slot->magazine.set_closed(false);
    }
  }
}

std::vector<AddressRange> Pool::segments_of(ArenaId tag) const {
  std::vector<AddressRange> segments;
  for (const auto& [address, first] : segments_) {
    if (tag_of(first->heap->stream->arena) != tag) continue;
    const Block* last = first;
    while (last->next != nullptr) last = last->next;
    segments.push_back({address, last->end()});
  }
  return segments;
}

// Counts chunks of segments as asleep, or as not any more.
void Pool::count_asleep(const AddressRange& chunks, bool is_asleep) {
  for (auto segment = std::prev(segments_.upper_bound(chunks.begin));
       segment != segments_.end() && segment->first < chunks.end; ++segment) {
    const Heap& heap = *segment->second->heap;
    const Block* last = segment->second;
    while (last->next != nullptr) last = last->next;
    const size_t bytes = std::min(chunks.end, last->end()) - std::max(chunks.begin, segment->first);
    size_t& of_class = asleep_bytes_[static_cast<size_t>(heap.size_class)];
    size_t& of_arena = arenas_[heap.stream->arena].asleep_bytes;
    of_class = is_asleep ? of_class + bytes : of_class - bytes;
    of_arena = is_asleep ? of_arena + bytes : of_arena - bytes;
  }
}

size_t Pool::sleep(const std::vector<ArenaId>& tags, ContentStore* store) {
  static constexpr TraceLabel kSleep{"sleep", "allocator"};
  const TraceSpan span(kSleep);
  if (!backing_.is_virtual()) {
    throw ConfigError("device " + std::to_string(device_) +
                      "'s pool has memory at fixed addresses (the device has no virtual memory "
                      "management, or virtual_memory=off): it cannot sleep");
  }
  Lock lock(mutex_);
  std::vector<ArenaId> awake;
  for (const ArenaId tag : tags) {
    const auto known = sleeping_.find(tag);
    if (known == sleeping_.end()) {
      if (std::find(awake.begin(), awake.end(), tag) == awake.end()) awake.push_back(tag);
    } else if (known->second.phase != Sleeping::Phase::kAsleep) {
      throw StateError("another thread puts memory with the tag '" + arena_name(tag) +
                       "' to sleep, or wakes it");
    }
  }
  if (awake.empty()) return 0;
  check_not_shared(awake);
  if (captures()) {
    throw StateError("memory cannot sleep while a CUDA graph is being recorded on device " +
                     std::to_string(device_));
  }
  const RelaxedCaptureScope relaxed;
  size_t copied_bytes = 0;
  std::vector<PhysicalMemory> released;
  try {
    begin_sleep(lock, awake);
    std::vector<SleepPlan> plans;
    for (const ArenaId tag : awake) {
      plans.push_back(plan_sleep(tag, store != nullptr));
      copied_bytes += copy_out(lock, sleeping_.at(tag), plans.back(), store);
    }
    for (size_t i = 0; i < awake.size(); ++i) {
      std::vector<PhysicalMemory> given = end_sleep(awake[i], plans[i]);
      std::move(given.begin(), given.end(), std::back_inserter(released));
    }
    count_memory();
  } catch (const std::exception& error) {
    const std::vector<ArenaId> left = undo_sleep(lock, awake);
    if (left.empty()) throw;
    throw StateError(std::string(error.what()) +
                     "; and the driver refused to put memory with the "
                     "tag '" +
                     arena_name(left.front()) +
                     "' back to its addresses: it is asleep, "
                     "with its contents, until it is woken");
  }
  if (settings_.check_every != 0) check_at_intervals();
  lock.unlock();
  released
      .clear();  // To the driver. An error is reported: the memory is held no longer either way.
  return copied_bytes;
}

// Another process would go on with memory that this one does not use any more.
void Pool::check_not_shared(const std::vector<ArenaId>& tags) const {
  for (const auto& [address, first] : segments_) {
    const ArenaId tag = tag_of(first->heap->stream->arena);
    if (std::find(tags.begin(), tags.end(), tag) == tags.end()) continue;
    for (const Block* block = first; block != nullptr; block = block->next) {
      if (!block->is_shared) continue;
      throw StateError("memory with the tag '" + arena_name(tag) +
                       "' cannot sleep: a block of it is shared with other processes; free it, "
                       "or share copies that have another tag");
    }
  }
}

// Closes the tags, waits for all work on their memory, and takes from them what nobody uses.
void Pool::begin_sleep(Lock& lock, const std::vector<ArenaId>& tags) {
  for (const ArenaId tag : tags) set_asleep(tag, true);
  wait_for_device(lock, backing_.devices());
  const CountOnExit count(*this);
  size_t evicted_bytes = 0;
  for (auto& [key, stream] : streams_) {
    const bool is_wanted = std::find(tags.begin(), tags.end(), tag_of(stream.arena)) != tags.end();
    if (!is_wanted || stream.is_private()) continue;
    for (Heap& heap : stream.heaps) {
      evicted_bytes += evict(heap, heap.free_bytes, AddressRange{}, Overshoot::kAny);
    }
  }
  backing_.release_cached(evicted_bytes);
}

// Saves a tag's contents and unmaps its chunks. Gives the bytes that were copied.
size_t Pool::copy_out(Lock& lock, Sleeping& sleeping, const SleepPlan& plan, ContentStore* store) {
  sleeping.pieces = plan.pieces;
  const size_t count = plan.pieces.size();
  size_t started = 0;
  size_t copied_bytes = 0;
  for (size_t piece = 0; piece < count; ++piece) {
    {
      const Unlocked unlocked(lock);
      if (sleeping.contents == nullptr) sleeping.contents = store->begin(device_, plan.pieces);
      while (started < std::min(count, piece + kAheadMax)) sleeping.contents->start_save(started++);
      sleeping.contents->finish_save(piece);
    }
    copied_bytes += plan.pieces[piece].size_bytes;
    for (const AddressRange& chunks : plan.chunks[piece]) backing_.detach(chunks);
  }
  for (const AddressRange& chunks : plan.empty_chunks) backing_.detach(chunks);
  return copied_bytes;
}

// Nothing can fail any more: the tag's memory is the caller's to release.
std::vector<PhysicalMemory> Pool::end_sleep(ArenaId tag, const SleepPlan& plan) {
  std::vector<PhysicalMemory> released;
  const auto give_up = [&](const std::vector<AddressRange>& ranges) {
    for (const AddressRange& chunks : ranges) {
      std::vector<PhysicalMemory> taken = backing_.take_detached(chunks);
      std::move(taken.begin(), taken.end(), std::back_inserter(released));
      count_asleep(chunks, true);
    }
  };
  for (const auto& chunks : plan.chunks) give_up(chunks);
  give_up(plan.empty_chunks);
  Sleeping& sleeping = sleeping_.at(tag);
  sleeping.phase = Sleeping::Phase::kAsleep;
  sleeping.live_bytes.assign(sleeping.pieces.size(), 0);
  for (const AddressRange& range : live_ranges(tag)) {
    for_each_overlap(sleeping.pieces, range,
                     [&](size_t piece, size_t bytes) { sleeping.live_bytes[piece] += bytes; });
  }
  for (size_t piece = 0; piece < sleeping.pieces.size(); ++piece) {
    // Its blocks were freed since it was saved.
    if (sleeping.live_bytes[piece] == 0) sleeping.contents->drop(piece);
  }
  return released;
}

// The block is being freed: nobody will ask for what was saved of it, and no stream uses it.
void Pool::give_up_contents(Block& block) {
  Sleeping& sleeping = sleeping_.at(tag_of(block.heap->stream->arena));
  if (sleeping.phase != Sleeping::Phase::kAsleep) return;
  block.uses.clear();
  if (block.heap->stream->is_private() || sleeping.contents == nullptr) return;
  for_each_overlap(sleeping.pieces, {block.address, block.end()}, [&](size_t piece, size_t bytes) {
    sleeping.live_bytes[piece] -= bytes;
    if (sleeping.live_bytes[piece] == 0) sleeping.contents->drop(piece);
  });
}

void Pool::count_sleeping(ArenaId tag, spillover_tag_stats_t& statistics) const {
  for (const auto& [arena, usage] : arenas_) {
    if (tag_of(arena) == tag) statistics.asleep_bytes += static_cast<int64_t>(usage.asleep_bytes);
  }
  const auto known = sleeping_.find(tag);
  if (known == sleeping_.end() || known->second.contents == nullptr) return;
  for (size_t piece = 0; piece < known->second.live_bytes.size(); ++piece) {
    if (known->second.live_bytes[piece] == 0) continue;
    statistics.saved_bytes += static_cast<int64_t>(known->second.pieces[piece].size_bytes);
  }
}

// Puts everything back. Gives the tags for which the driver refused that.
std::vector<ArenaId> Pool::undo_sleep(Lock& lock, const std::vector<ArenaId>& tags) {
  std::vector<ArenaId> left;
  for (const ArenaId tag : tags) {
    const auto known = sleeping_.find(tag);
    if (known == sleeping_.end()) continue;
    Sleeping& sleeping = known->second;
    if (sleeping.contents != nullptr) {
      const Unlocked unlocked(lock);
      sleeping.contents->settle();
      sleeping.contents.reset();
    }
    sleeping.pieces.clear();
    try {
      for (const AddressRange& segment : segments_of(tag)) backing_.attach(segment);
      set_asleep(tag, false);
    } catch (const Error&) {
      sleeping.phase = Sleeping::Phase::kAsleep;
      left.push_back(tag);
    }
  }
  count_memory();
  return left;
}

}  // namespace spillover
