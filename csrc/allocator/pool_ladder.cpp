// What the pool does when memory has run out, rung by rung, and how it gives memory back.
#include <algorithm>
#include <chrono>
#include <exception>
#include <set>
#include <utility>
#include <vector>

#include "allocator/pool.hpp"
#include "allocator/statistics.hpp"
#include "base/error.hpp"
#include "base/pause.hpp"
#include "driver/device.hpp"
#include "trace/span.hpp"

namespace spillover {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::microseconds kPauseMin{20};
constexpr std::chrono::microseconds kPauseMax{1000};

// Ends the asking of reclaimers that say each time that they have freed something.
constexpr size_t kReclaimRoundsMax = 16;

constexpr TraceLabel kLadder{"out of memory: look for more", "allocator"};
constexpr TraceLabel kWaitForStreams{"wait for streams", "stall"};
constexpr TraceLabel kWaitForDevice{"wait for the device", "stall"};
constexpr TraceLabel kGiveBackIdle{"give idle memory back", "allocator"};
constexpr TraceLabel kReclaim{"ask reclaimers", "allocator"};
constexpr TraceLabel kFree{"cuMemFree", "allocator"};

}  // namespace

// Null is never the answer: throws DeviceOutOfMemoryError.
Block* Pool::obtain_by_waiting(Lock& lock, const Request& request, LadderAttempts& attempts) {
  const TraceSpan span(kLadder, request.size_bytes);
  ++statistics_.alloc_retries;
  if (Block* block = search_again(lock, request, attempts)) return block;
  if (Block* block = borrow(request)) return block;
  if (request.is_captured) throw_out_of_memory(request, attempts);
  if (Block* block = reclaim(lock, request, attempts)) return block;
  if (Block* block = take_behind_watermark(request)) return block;
  throw_out_of_memory(request, attempts);
}

// Looks for a fit in everything that is free or will be; null where there is none.
Block* Pool::search_again(Lock& lock, const Request& request, LadderAttempts& attempts) {
  attempts.kept_bytes += empty_magazines();
  const auto try_again = [&]() -> Block* {
    if (Block* block = take_best_fit(request)) return block;
    return grow(request, Source::kNew);
  };
  size_t usable_before = usable_bytes(request);
  // What has become usable since this was asked last; memory that is used meanwhile is no loss.
  const auto gained_bytes = [&] {
    const size_t usable_now = usable_bytes(request);
    const size_t before = std::exchange(usable_before, usable_now);
    return usable_now - std::min(usable_now, before);
  };
  const auto start = Clock::now();
  const std::optional<Block*> polled = poll_until_fit(lock, request);
  if (polled.value_or(nullptr) != nullptr) return *polled;
  attempts.waited += std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now() - start);
  attempts.waited_bytes += gained_bytes();
  attempts.has_timed_out = !polled;
  // Where streams have not come to their marks, a wait for all of the device might have no end; and
  // what gives memory at fixed addresses back waits for the device.
  const bool may_wait = !request.is_captured && !captures();
  if (polled && may_wait && (foreign_bytes() != 0 || pending_.has_unmarked())) {
    wait_for_device(lock);
    attempts.has_waited_for_device = true;
    attempts.device_bytes += gained_bytes();
    if (Block* block = try_again()) return block;
  }
  if (polled || backing_.is_virtual()) {
    const size_t held_before = backing_.held_bytes();
    release_idle(lock, 0);
    attempts.has_returned_idle = true;
    attempts.returned_bytes += held_before - std::min(held_before, backing_.held_bytes());
  }
  return try_again();
}

// Asks the reclaimers in turn, with the mutex released, until the request fits or none has more to
// give; null then. See Note [Reclaimers].
Block* Pool::reclaim(Lock& lock, const Request& request, LadderAttempts& attempts) {
  const TraceSpan span(kReclaim, request.size_bytes);
  const auto count_frees = [&] { return totals().allocation[SPILLOVER_CLASS_ALL].freed; };
  for (size_t round = 0; round < kReclaimRoundsMax; ++round) {
    const int64_t free_count = count_frees();
    size_t round_bytes = 0;
    const std::vector<uint64_t> numbers = reclaimers_.numbers();
    attempts.reclaimer_count = std::max(attempts.reclaimer_count, numbers.size());
    for (const uint64_t number : numbers) {
      lock.unlock();
      const size_t freed_bytes =
          reclaimers_.call(number, request.size_bytes, request.stream.handle);
      lock.lock();
      if (freed_bytes == 0) continue;
      round_bytes += freed_bytes;
      attempts.reclaimed_bytes += freed_bytes;
      if (Block* block = search_again(lock, request, attempts)) return block;
    }
    if (round_bytes != 0) continue;
    // Another thread's call may have freed what this one's found gone.
    return count_frees() == free_count ? nullptr : search_again(lock, request, attempts);
  }
  return nullptr;
}

// Free memory that the request may use as far as is known, however it lies.
size_t Pool::usable_bytes(const Request& request) const {
  size_t sum_bytes = backing_.cached_bytes();
  for (const auto& [key, stream] : streams_) {
    const bool is_own = stream.key == request.stream && stream.arena == request.arena;
    if (is_own || (stream.serves_others() && stream.completed_count == stream.freed_count)) {
      sum_bytes += stream.free_bytes();
    } else if (stream.serves_others()) {
      for (const Heap& heap : stream.heaps) {
        for (const Block* block : heap.free) {
          for (const AddressRange& part : complete_parts(*block, stream.completed_count)) {
            sum_bytes += part.size_bytes();
          }
        }
      }
    }
  }
  return sum_bytes;
}

// Waits for marks, with the mutex released, until the request fits. Null where nothing more is to
// be had from marks, no value where the time ran out: streams may wait for something that the
// caller submits after it has got its memory.
std::optional<Block*> Pool::poll_until_fit(Lock& lock, const Request& request) {
  const TraceSpan span(kWaitForStreams, request.size_bytes);
  const auto deadline = Clock::now() + settings_.wait_max;
  auto pause = kPauseMin;
  for (;;) {
    const bool has_marks = mark_streams();
    if (Block* block = take_best_fit(request)) return block;
    if (Block* block = grow(request, Source::kNew)) return block;
    if (!has_marks && !pending_.has_marked()) return nullptr;
    if (Clock::now() >= deadline) return std::nullopt;
    lock.unlock();
    pause_for(pause);
    lock.lock();
    empty_magazines();
    pause = std::min(2 * pause, kPauseMax);
    pending_.poll();
  }
}

// Puts a mark behind the frees of each stream that may be asked. False where no stream has a mark
// that was not reached.
bool Pool::mark_streams() {
  bool has_marks = false;
  for (auto& [key, stream] : streams_) {
    if (!stream.serves_others() || stream.free_bytes() == 0 || prove_idle(stream)) continue;
    if (may_ask(stream)) mark(stream, StreamState::MarkKind::kTail);
    has_marks = has_marks || !stream.marks.empty();
  }
  return has_marks;
}

// Freed bytes of streams that may not be asked, as far as neither completion nor a mark tells when
// they are complete.
size_t Pool::foreign_bytes() const {
  size_t sum_bytes = 0;
  for (const auto& [key, stream] : streams_) {
    if (!stream.is_evictable() || stream.completed_count == stream.freed_count || may_ask(stream)) {
      continue;
    }
    sum_bytes += std::min(stream.free_bytes(), stream.unmarked_bytes);
  }
  return sum_bytes;
}

// Afterwards everything that was freed before is known to be complete. Throws DriverError.
void Pool::wait_for_device(Lock& lock, const std::vector<int>& other_devices) {
  empty_magazines();
  std::vector<std::pair<StreamStates::key_type, uint64_t>> freed_counts;
  for (const auto& [key, stream] : streams_) freed_counts.emplace_back(key, stream.freed_count);
  const uint64_t latest_use = pending_.latest();
  std::set<int> devices = pending_.devices();
  devices.insert(device_);
  devices.insert(other_devices.begin(), other_devices.end());
  lock.unlock();
  {
    const TraceSpan span(kWaitForDevice);
    for (const int device : devices) synchronize_device(device);
  }
  lock.lock();
  pending_.complete(latest_use);
  pending_.poll();
  for (const auto& [key, freed_count] : freed_counts) {
    const auto stream = streams_.find(key);
    if (stream == streams_.end()) continue;
    complete_frees(stream->second, freed_count);
  }
}

// Gives idle chunks to where they came from until at most keep_bytes are held, and forgets streams
// that have nothing any more. May release the mutex in between.
void Pool::release_idle(Lock& lock, size_t keep_bytes) {
  const TraceSpan span(kGiveBackIdle);
  {
    const CountOnExit count(*this);
    if (backing_.held_bytes() > keep_bytes) evict_upstreams();  // What serves nobody goes first.
    const size_t surplus_bytes =
        backing_.held_bytes() - std::min(backing_.held_bytes(), keep_bytes);
    if (backing_.cached_bytes() < surplus_bytes) {
      gather_idle(surplus_bytes - backing_.cached_bytes(), AddressRange{}, Overshoot::kAny);
    }
    forget_empty();
    backing_.release_cached(surplus_bytes);
    // What was held for a peak of the past is not taken again without need.
    used_bytes_peak_ =
        std::min(used_bytes_peak_, backing_.held_bytes() - backing_.upstream_bytes());
  }
  return_released(lock);
}

// cuMemFree waits for all of the device's work, which may wait in turn for a thread that needs the
// mutex. Afterwards the driver has what this thread has released and, unless that takes too long,
// what others have; upstreams likewise. Throws the first DriverError when all chunks had their
// turn.
void Pool::return_released(Lock& lock) {
  return_to_upstreams(lock);
  std::vector<DeviceMemory> released = backing_.take_released();
  std::exception_ptr failure;
  if (!released.empty()) {
    ++releases_in_flight_;
    lock.unlock();
    for (DeviceMemory& memory : released) {
      const TraceSpan span(kFree, memory.size_bytes());
      try {
        memory.release();
      } catch (const Error&) {
        if (!failure) failure = std::current_exception();
      }
    }
    released.clear();  // Tries once more where the driver could not be asked.
    lock.lock();
    --releases_in_flight_;
    release_ended_.notify_all();
  }
  // An upstream's function that calls the pool is a release in flight itself.
  if (!Upstream::is_running()) {
    release_ended_.wait_for(lock, settings_.wait_max, [this] { return releases_in_flight_ == 0; });
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace spillover
