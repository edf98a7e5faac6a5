// Private arenas: memory that stays where it is and serves nobody else.
//
// Note [Private arenas]. The kernels of a CUDA graph have the addresses of its memory in them, and
// the graph is launched on any stream, at any time, without the pool being told. So what an arena
// is for may not be seen from its frees, and its free memory is not idle memory:
//   - while the arena is in use its free blocks serve its own requests on their own stream, in the
//     order in which these come, which is that of the graph's kernels. They are not stolen, moved,
//     unmapped or trimmed, and do not change heaps;
//   - what it grows by is memory whose last use is complete, whichever stream that was on: a
//     graph's launch is not ordered with the stream that recorded it;
//   - nothing is recorded or asked on its streams for its sake, but for Note [Reuse in a capture]
//     in pending_uses.hpp, and it has no magazines;
//   - a wait for the device invalidates a graph that is being recorded, so none is made then; the
//     pool knows the streams that may record one from their requests, or is told before these;
//   - once the arena is *released* its free blocks, and live ones when they are freed, are ordinary
//     memory as soon as the whole device was waited for: graphs may still run on any stream.
//
// Note [Whole blocks]. An arena may be one of *whole* blocks: each has chunks of its own and is a
// segment, which stays what it is until the arena is released. A request gets a free block as it
// is, however much larger that is, as a pool of torch's with no_split does; free blocks do not
// merge, and what the arena grows by is what is asked for. So a block can be given to somebody
// (a network card, a communicator) as the memory of the driver's that it is.
#include <algorithm>

#include "allocator/pool.hpp"
#include "base/error.hpp"
#include "driver/context.hpp"
#include "driver/stream.hpp"

namespace spillover {

void* Pool::allocate_in(ArenaId arena, size_t size_bytes, StreamHandle stream) {
  Request request = make_request(std::max<size_t>(size_bytes, 1), stream, arena);
  if (request.stream.handle != nullptr) {
    const ContextScope scope(device_);
    request.is_captured = stream_is_capturing(stream);
    if (request.is_captured && PendingUses::reuses_in_capture()) {
      const auto position = capture_position(stream);
      request.capture = position ? position->capture : 0;
    }
  }
  Lock lock(mutex_);
  request.is_whole = private_arena(arena).is_whole;
  if (request.is_whole && request.size_bytes <= device_bytes_) {
    request.size_bytes = round_up(request.size_bytes, backing_.unit_bytes());
    request.size_class =
        request.size_bytes <= kSmallRequestMax ? SizeClass::kSmall : SizeClass::kLarge;
  }
  if (size_bytes == 0) return nullptr;
  check_awake(arena);
  return serve(lock, request);
}

ArenaId Pool::make_arena() {
  const std::lock_guard lock(mutex_);
  const ArenaId arena = next_private_arena_++;
  private_arenas_.emplace(arena, ArenaOptions{});
  tags_.emplace(arena, ThreadCache::current_arena());
  return arena;
}

void Pool::expect_stream(ArenaId arena, StreamHandle stream) {
  const StreamKey key = identify_stream(device_, stream);
  const std::lock_guard lock(mutex_);
  static_cast<void>(private_arena(arena));
  state_of(key, arena);
}

void Pool::set_arena_options(ArenaId arena, const ArenaOptions& options) {
  const std::lock_guard lock(mutex_);
  ArenaOptions& known = private_arena(arena);
  for (auto& [key, stream] : streams_) {
    if (stream.arena != arena) continue;
    if (stream.block_count() != 0 && options.is_whole != known.is_whole) {
      throw StateError("whether the blocks of private arena " + std::to_string(arena) +
                       " are split cannot change any more; set it before the first allocation");
    }
  }
  for (auto& [key, stream] : streams_) {
    if (stream.arena == arena) stream.is_whole = options.is_whole;
  }
  known = options;
}

void Pool::release_arena(ArenaId arena) {
  const std::lock_guard lock(mutex_);
  static_cast<void>(private_arena(arena));
  private_arenas_.erase(arena);
  for (auto& [key, stream] : streams_) {
    if (stream.arena != arena) continue;
    stream.is_released = true;
    // Whatever was used lately by whom, all of it counts as freed now.
    ++stream.freed_count;
    stream.freed_ranges.clear();
    stream.ranges_since = stream.freed_count;
    stream.unmarked_bytes = stream.free_bytes();
    for (Heap& heap : stream.heaps) {
      for (Block* block : heap.free) block->freed_at = stream.freed_count;
    }
  }
}

void Pool::trim_arena(ArenaId arena) {
  Lock lock(mutex_);
  if (!is_private_arena(arena) || arena >= next_private_arena_) {
    throw ConfigError("there is no private arena number " + std::to_string(arena));
  }
  if (private_arenas_.count(arena) != 0) return;
  const RelaxedCaptureScope relaxed;
  if (!captures()) wait_for_device(lock);
  {
    const CountOnExit count(*this);
    size_t evicted_bytes = 0;
    for (auto& [key, stream] : streams_) {
      if (stream.arena != arena || stream.is_asleep) continue;
      for (Heap& heap : stream.heaps) {
        evicted_bytes += evict(heap, heap.free_bytes, AddressRange{}, Overshoot::kAny);
      }
    }
    forget_empty();
    backing_.release_cached(evicted_bytes);
  }
  return_released(lock);
}

ArenaOptions& Pool::private_arena(ArenaId arena) {
  const auto found = private_arenas_.find(arena);
  if (found != private_arenas_.end()) return found->second;
  throw ConfigError("there is no private arena number " + std::to_string(arena) +
                    " in use on device " + std::to_string(device_) + "; it was released before");
}

// Whether this thread may ask the driver about the stream at any time, and learns from the answer
// when the frees are complete.
bool Pool::may_ask(const StreamState& stream) const {
  return !is_private_arena(stream.arena) && may_be_asked(device_, stream.key);
}

// Whether a graph is being recorded that has, or is going to have, memory of a private arena.
bool Pool::captures() const {
  const ContextScope scope(device_);
  return std::any_of(streams_.begin(), streams_.end(), [&](const auto& entry) {
    const StreamState& stream = entry.second;
    return stream.is_private() && stream.key.handle != nullptr &&
           may_be_asked(device_, stream.key) && stream_is_capturing(stream.key.handle);
  });
}

// A free block of an arena that lends; it goes back there. Null where there is none.
Block* Pool::borrow(const Request& request) {
  if (is_private_arena(request.arena)) return nullptr;
  for (auto state = streams_.lower_bound({request.stream, kFirstPrivateArena});
       state != streams_.end() && state->second.key == request.stream; ++state) {
    const auto options = private_arenas_.find(state->second.arena);
    if (options == private_arenas_.end() || !options->second.lends) continue;
    if (state->second.is_asleep) continue;
    Request lent = request;
    lent.arena = state->second.arena;
    if (Block* block = take_best_fit(lent)) return block;
  }
  return nullptr;
}

// Forgets streams and arenas that have nothing any more.
void Pool::forget_empty() {
  std::erase_if(streams_, [&](const auto& entry) {
    const StreamState& stream = entry.second;
    // A magazine names its stream as long as its thread lives.
    const bool is_kept = is_private_arena(stream.arena) ? !stream.is_released : stream.is_immortal;
    if (stream.block_count() != 0 || is_kept) return false;
    forgotten_count_ = std::max(forgotten_count_, stream.freed_count);
    return true;
  });
  std::erase_if(arenas_, [&](const auto& entry) {
    return is_private_arena(entry.first) && entry.second.mapped_bytes == 0 &&
           private_arenas_.count(entry.first) == 0;
  });
  std::erase_if(tags_, [&](const auto& entry) {
    return arenas_.count(entry.first) == 0 && private_arenas_.count(entry.first) == 0;
  });
}

}  // namespace spillover
