// Memory of a tag that sleeps comes back at its addresses: Note [Sleep] in pool_sleep.cpp.
#include <algorithm>
#include <string>
#include <utility>

#include "allocator/arenas.hpp"
#include "allocator/pool.hpp"
#include "base/bytes.hpp"
#include "base/error.hpp"
#include "driver/context.hpp"
#include "driver/device.hpp"
#include "trace/span.hpp"

namespace spillover {

size_t Pool::wake(const std::vector<ArenaId>& tags) {
  static constexpr TraceLabel kWake{"wake", "allocator"};
  const TraceSpan span(kWake);
  Lock lock(mutex_);
  std::vector<ArenaId> asleep;
  for (const ArenaId tag : tags) {
    const auto known = sleeping_.find(tag);
    if (known == sleeping_.end()) continue;
    if (known->second.phase != Sleeping::Phase::kAsleep) {
      throw StateError("another thread puts memory with the tag '" + arena_name(tag) +
                       "' to sleep, or wakes it");
    }
    if (std::find(asleep.begin(), asleep.end(), tag) == asleep.end()) asleep.push_back(tag);
  }
  if (asleep.empty()) return 0;
  if (captures()) {
    throw StateError("memory cannot wake while a CUDA graph is being recorded on device " +
                     std::to_string(device_));
  }
  const RelaxedCaptureScope relaxed;
  for (const ArenaId tag : asleep) sleeping_.at(tag).phase = Sleeping::Phase::kWaking;
  size_t copied_bytes = 0;
  try {
    for (const ArenaId tag : asleep) copied_bytes += copy_in(lock, tag);
    for (const ArenaId tag : asleep) {
      const Unlocked unlocked(lock);
      if (SavedContents* contents = sleeping_.at(tag).contents.get()) contents->finish_loads();
    }
  } catch (...) {
    undo_wake(lock, asleep);
    throw;
  }
  std::vector<std::unique_ptr<SavedContents>> done;
  for (const ArenaId tag : asleep) {
    done.push_back(std::move(sleeping_.at(tag).contents));
    set_asleep(tag, false);
  }
  count_memory();
  if (settings_.check_every != 0) check_at_intervals();
  lock.unlock();
  done.clear();
  return copied_bytes;
}

// Whole chunks without a live block stay without memory and lose their addresses.
void Pool::drop_freed(ArenaId tag) {
  std::vector<Run> runs;
  for (auto& [key, stream] : streams_) {
    if (tag_of(stream.arena) != tag || stream.is_private()) continue;
    for (const Heap& heap : stream.heaps) {
      for (Block* block : heap.free) {
        const AddressRange chunks = backing_.chunks_within({block->address, block->end()});
        if (chunks.size_bytes() != 0) runs.push_back({block, chunks});
      }
    }
  }
  for (const Run& run : runs) {
    count_asleep(run.chunks, false);
    carve(run.block, run.chunks);
    backing_.forget(run.chunks);
  }
  count_memory();
}

// Maps a tag's chunks and starts to copy its contents. Gives the bytes that are copied.
size_t Pool::copy_in(Lock& lock, ArenaId tag) {
  Sleeping& sleeping = sleeping_.at(tag);
  const std::vector<AddressRange> segments = segments_of(tag);
  if (std::none_of(segments.begin(), segments.end(), [&](const AddressRange& segment) {
        return backing_.asleep_bytes_in(segment) != 0;
      })) {
    // A sleep failed half-way: the contents are in device memory.
    for (const AddressRange& segment : segments) backing_.attach(segment);
    return 0;
  }
  drop_freed(tag);
  const SleepPlan plan = plan_wake(tag);
  size_t copied_bytes = 0;
  for (size_t piece = 0; piece < plan.pieces.size(); ++piece) {
    for (const AddressRange& chunks : plan.chunks[piece]) provide(lock, tag, chunks);
    if (plan.pieces[piece].size_bytes == 0) continue;
    const Unlocked unlocked(lock);
    sleeping.contents->start_load(piece, plan.pieces[piece].parts);
    copied_bytes += plan.pieces[piece].size_bytes;
  }
  for (const AddressRange& chunks : plan.empty_chunks) provide(lock, tag, chunks);
  return copied_bytes;
}

// Memory for chunks that sleep, from wherever a request would get it. Throws
// DeviceOutOfMemoryError.
void Pool::provide(Lock& lock, ArenaId tag, const AddressRange& chunks) {
  if (!provide_from_idle(chunks) && !provide_by_waiting(lock, chunks)) throw_cannot_wake(tag);
  count_asleep(chunks, false);
  count_memory();  // The mutex is released between pieces.
  sleeping_.at(tag).provided.push_back(chunks);
}

bool Pool::provide_from_idle(const AddressRange& chunks) {
  const CountOnExit count(*this);
  if (backing_.provide(chunks, room_bytes())) return true;
  const size_t missing_bytes =
      chunks.size_bytes() - std::min(chunks.size_bytes(), backing_.cached_bytes());
  gather_idle(missing_bytes, AddressRange{}, Overshoot::kBounded);
  return backing_.provide(chunks, room_bytes());
}

bool Pool::provide_by_waiting(Lock& lock, const AddressRange& chunks) {
  const auto try_again = [&] {
    wait_for_device(lock);
    release_idle(lock, 0);
    const CountOnExit count(*this);
    return backing_.provide(chunks, room_bytes());
  };
  if (try_again()) return true;
  for (const uint64_t number : reclaimers_.numbers()) {
    size_t freed_bytes = 0;
    {
      const Unlocked unlocked(lock);
      freed_bytes = reclaimers_.call(number, chunks.size_bytes(), nullptr);
    }
    if (freed_bytes != 0 && try_again()) return true;
  }
  return false;
}

void Pool::throw_cannot_wake(ArenaId tag) {
  size_t asleep_bytes = 0;
  size_t provided_bytes = 0;
  for (const AddressRange& segment : segments_of(tag)) {
    asleep_bytes += backing_.asleep_bytes_in(segment);
  }
  for (const AddressRange& chunks : sleeping_.at(tag).provided)
    provided_bytes += chunks.size_bytes();
  const MemoryInfo memory = memory_info(device_);
  const size_t room = std::min(room_bytes(), memory.free_bytes) + backing_.cached_bytes();
  const size_t missing_bytes = asleep_bytes - std::min(asleep_bytes, room);
  const size_t limit = std::min(limit_by_settings(), memory.total_bytes);
  throw DeviceOutOfMemoryError(
      "CUDA out of memory: waking memory with the tag '" + arena_name(tag) + "' needs " +
          format_bytes(asleep_bytes + provided_bytes) + ", of which " +
          format_bytes(missing_bytes) + " are missing: device " + std::to_string(device_) +
          " has " + format_bytes(memory.free_bytes + provided_bytes) + " free of " +
          format_bytes(memory.total_bytes) + ", and the pool holds " +
          format_bytes(backing_.held_bytes() - provided_bytes) + " of at most " +
          format_bytes(limit) +
          ". All of it is asleep still and intact; free memory, or put other memory to sleep, and "
          "wake it again",
      missing_bytes);
}

void Pool::undo_wake(Lock& lock, const std::vector<ArenaId>& tags) noexcept {
  for (const ArenaId tag : tags) {
    Sleeping& sleeping = sleeping_.at(tag);
    if (sleeping.contents != nullptr) {
      const Unlocked unlocked(lock);
      sleeping.contents->settle();
    }
    for (const AddressRange& chunks : sleeping.provided) {
      backing_.withdraw(chunks);
      count_asleep(chunks, true);
    }
    sleeping.provided.clear();
    sleeping.phase = Sleeping::Phase::kAsleep;
    count_memory();
  }
}

}  // namespace spillover
