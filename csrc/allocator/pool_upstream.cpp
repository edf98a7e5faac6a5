// Private arenas whose memory comes from elsewhere.
//
// Note [Upstreams]. An arena may get its chunks from another allocator's functions, its *upstream*
// (upstream.hpp). Those chunks are blocks, counters and waits like others, and somebody else's
// memory:
//   - they serve their arena only, also after its release: then what is idle goes back where it
//     came from, when memory is trimmed or has run out;
//   - they are never mapped, moved or unmapped, and belong to no tag: what they are for (buffers
//     that a network card knows, memory that the host shares) may not bear it. So a tag sleeps and
//     wakes without the arenas of this kind that were made under it;
//   - a request that finds no free block asks the upstream, then does what might give the upstream
//     memory, and asks again. The pool's own idle chunks do not serve it;
//   - they count as held, so that a limit is one for everything.
// The functions are called without the mutex, as they may take Python's lock or call the pool.
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "allocator/page_table.hpp"
#include "allocator/pool.hpp"
#include "allocator/statistics.hpp"
#include "base/bytes.hpp"
#include "base/error.hpp"
#include "driver/context.hpp"

namespace spillover {

ArenaId Pool::make_arena(std::shared_ptr<const Upstream> upstream) {
  const std::lock_guard lock(mutex_);
  const ArenaId arena = next_private_arena_++;
  private_arenas_.emplace(arena, ArenaOptions{});
  tags_.emplace(arena, arena);
  upstreams_.emplace(arena, std::move(upstream));
  return arena;
}

// As obtain(), where the pool's own memory must not serve the request.
Block* Pool::obtain_from_upstream(Lock& lock, const Request& request) {
  const RelaxedCaptureScope relaxed;
  const size_t unit_bytes = backing_.unit_bytes();
  const size_t least_bytes = round_up(request.size_bytes, unit_bytes);
  const size_t preferred_bytes = preferred_fixed_bytes(request);
  const auto take = [&]() -> Block* {
    Block* block = take_from_upstream(lock, request, preferred_bytes);
    if (block != nullptr || least_bytes == preferred_bytes) return block;
    return take_from_upstream(lock, request, least_bytes);
  };
  if (Block* block = take()) return block;
  LadderAttempts attempts;
  ++statistics_.alloc_retries;
  // Memory that goes back to the driver may be what the upstream lacks.
  if (Block* block = search_again(lock, request, attempts)) return block;
  if (Block* block = take()) return block;
  if (!request.is_captured) {
    if (Block* block = reclaim(lock, request, attempts)) return block;
    if (attempts.reclaimed_bytes != 0) {
      if (Block* block = take()) return block;
    }
  }
  throw_out_of_memory(request, attempts);
}

// A chunk from the arena's upstream as a block that is in no heap's set; null where the upstream or
// the limit has no room. Releases the mutex meanwhile. Throws StateError for memory that cannot be.
Block* Pool::take_from_upstream(Lock& lock, const Request& request, size_t size_bytes) {
  static_cast<void>(private_arena(request.arena));
  if (request.requested_bytes > request.size_bytes || size_bytes > room_bytes()) return nullptr;
  std::shared_ptr<const Upstream> upstream = upstreams_.at(request.arena);
  asked_of_upstreams_bytes_ += size_bytes;
  auto memory = [&] {
    const Unlocked unlocked(lock);
    return UpstreamMemory::try_allocate(upstream, size_bytes, request.stream.handle);
  }();
  asked_of_upstreams_bytes_ -= size_bytes;
  const bool is_released = private_arenas_.count(request.arena) == 0;
  const DeviceAddress begin = memory ? memory->address() : 0;
  const std::string defect = memory && !is_released ? defect_of(begin, begin + size_bytes) : "";
  if (is_released || !defect.empty()) {
    {
      const Unlocked unlocked(lock);
      memory.reset();
      upstream.reset();
    }
    static_cast<void>(private_arena(request.arena));  // Throws where it was released.
    throw StateError("the allocator of a private memory pool gave memory " + defect +
                     "; it must give device memory of its own, as cudaMalloc does");
  }
  if (!memory) return nullptr;
  const CountOnExit count(*this);
  Heap& heap = heap_of(request);
  Block* block = adopt(heap, backing_.take_over(std::move(*memory)), 0);
  remove_free(block);
  return block;
}

// What is wrong with memory that an upstream gave; empty where nothing is.
std::string Pool::defect_of(DeviceAddress begin, DeviceAddress end) const {
  if (holds_any_of(begin, end)) return "that spillover's pool holds already";
  if (PageTable::instance().accepts(begin, end, this)) return "";
  return "at " + format_address(reinterpret_cast<void*>(begin)) +
         ", where device memory does not lie";
}

bool Pool::holds_any_of(DeviceAddress begin, DeviceAddress end) const {
  if (begin >= end) return false;
  const Pool* owner = PageTable::instance().pool_of(begin);
  if (owner != nullptr && owner != this) return true;
  const auto behind = segments_.lower_bound(end);
  if (behind == segments_.begin()) return false;
  const Block* last = std::prev(behind)->second;
  while (last->next != nullptr) last = last->next;
  return last->end() > begin;
}

// Takes idle chunks of released arenas away, for return_to_upstreams().
void Pool::evict_upstreams() {
  for (auto& [key, stream] : streams_) {
    if (!stream.has_upstream || !stream.is_evictable()) continue;
    for (Heap& heap : stream.heaps) {
      evict(heap, heap.free_bytes, AddressRange{}, Overshoot::kAny);
    }
  }
}

// Gives back what was taken away, and lets go of upstreams that are not needed any more.
void Pool::return_to_upstreams(Lock& lock) {
  std::vector<UpstreamMemory> returned = backing_.take_returned();
  auto unused = std::exchange(unused_upstreams_, {});
  if (returned.empty() && unused.empty()) return;
  ++releases_in_flight_;
  {
    const Unlocked unlocked(lock);
    returned.clear();
    unused.clear();
  }
  --releases_in_flight_;
  release_ended_.notify_all();
}

}  // namespace spillover
