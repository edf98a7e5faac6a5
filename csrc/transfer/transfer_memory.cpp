// Host memory of the transfer engine: who gets it, what gives way, and what is brought back ahead
// of its use. See transfer_engine.hpp.
//
// Note [What gives way]. Host memory that is asked for comes from the budget while that is not used
// up, and then from the payload whose next use is farthest; what is not known to be used counts as
// farther than all, the oldest first. If the disk has it too, its copy goes at no cost. If the host
// alone has it, it is written first, and who may block waits for that. Writes begin early, once
// three quarters of the budget are of the host alone, so that the farthest copies are on disk when
// memory is needed. Where the disk refuses, what is nearer and on disk gives way; when nothing
// does, and nothing is under way that would help, the request fails, with the disk's error where it
// had one.
#include <algorithm>
#include <string>
#include <thread>
#include <utility>

#include "base/check.hpp"
#include "base/error.hpp"
#include "transfer/transfer_bookkeeping.hpp"

namespace spillover {

// A budget smaller than what passage takes is that, where there is a disk.
size_t TransferEngine::limit_bytes() const {
  if (disk_ == nullptr) return options_.host_bytes_max;
  return std::max(options_.host_bytes_max, options_.staging_bytes);
}

// Does not block, but for what mapping and pinning memory take. Evicts only what is used after
// needed_at. Empty where there is no room; error then says why, where the pool knows.
std::optional<HostBuffer> TransferEngine::try_acquire(size_t size_bytes, uint64_t needed_at,
                                                      uint64_t since, std::exception_ptr* error) {
  for (;;) {
    {
      Garbage garbage;
      const Lock lock(mutex_);
      since = std::min(since, requests_);
      while (size_bytes > limit_bytes() - std::min(limit_bytes(), host_bytes_)) {
        if (!evict_farthest(needed_at, since, garbage)) return std::nullopt;
      }
      host_bytes_ += size_bytes;
      host_bytes_peak_ = std::max(host_bytes_peak_, host_bytes_);
    }
    try {
      return pool_->allocate(size_bytes);
    } catch (...) {
      if (error != nullptr) *error = std::current_exception();
    }
    // The pool has a limit of its own, and other users.
    Garbage garbage;
    const Lock lock(mutex_);
    host_bytes_ -= size_bytes;
    if (!evict_farthest(needed_at, since, garbage)) return std::nullopt;
  }
}

// Called with the mutex held. Only what the disk lacks makes it pass a payload over for one that is
// needed sooner: not, where that can be written.
bool TransferEngine::evict_farthest(uint64_t needed_at, uint64_t since, Garbage& garbage) {
  for (auto it = on_host_.rbegin(); it != on_host_.rend(); ++it) {
    Payload& payload = **it;
    if (needed_at != kAnyUse && payload.next_use <= needed_at) return false;
    bool waits_for_write = false;
    // From its end: that is needed last.
    for (auto chunk = payload.chunks.rbegin(); chunk != payload.chunks.rend(); ++chunk) {
      const Residency& residency = chunk->residency;
      waits_for_write = waits_for_write || residency.disk() == DiskCopy::kWriting ||
                        (residency.is_dirty() && chunk->write_failed_at < since);
      if (!residency.can_evict()) continue;
      change(*chunk, [](Residency& changed) { changed.evict(); });
      counters_->evicted_bytes += chunk->size_bytes;
      release_host(payload, *chunk, garbage);
      return true;
    }
    if (waits_for_write && disk_ != nullptr && !payload.is_dropped) return false;
  }
  return false;
}

HostBuffer TransferEngine::acquire(size_t size_bytes) {
  std::optional<HostBuffer> host = acquire_unless(size_bytes, [] { return false; });
  SPILLOVER_CHECK(host.has_value(), "memory that is never moot was not acquired");
  return *std::move(host);
}

// Blocks until there is room, or, where there is none, is_moot: empty then.
std::optional<HostBuffer> TransferEngine::acquire_unless(size_t size_bytes,
                                                         const std::function<bool()>& is_moot) {
  const uint64_t since = next_request();
  for (int retries = 0;;) {
    const uint64_t seen = changes();
    std::exception_ptr error;
    std::optional<HostBuffer> host = try_acquire(size_bytes, kAnyUse, since, &error);
    if (host || is_moot()) return host;
    if (help_to_memory(size_bytes, since, Asker::kProgram)) continue;
    // Others may have let go of memory, and ended, after this thread had looked for it.
    if (changes() == seen || retries++ == kRetriesMax) throw_no_memory(size_bytes, since, error);
    std::this_thread::yield();
  }
}

uint64_t TransferEngine::changes() const {
  const Lock lock(mutex_);
  return changes_;
}

uint64_t TransferEngine::next_request() {
  const Lock lock(mutex_);
  return ++requests_;
}

// Has something happen that may make memory free, and blocks until it has. False where nothing
// will.
bool TransferEngine::help_to_memory(size_t size_bytes, uint64_t since, Asker asker) {
  while (disk_ != nullptr) {
    {
      const Lock lock(mutex_);
      if (writing_bytes_ >= size_bytes) break;
    }
    if (!start_write(since, kAnyUse)) break;
  }
  const Stall stall(*counters_, StallCause::kHostBudget);
  std::optional<Wait> wait;
  {
    Lock lock(mutex_);
    if (is_closed_) return false;
    wait = find_wait();
    if (!wait) {
      // What others are about to do may help, but for those who wait like this one.
      const size_t mine = asker == Asker::kProgram ? 1 : 0;
      const bool has_pieces = !pieces_.empty() || serving_ > 0;
      if (active_calls_ <= blocked_calls_ + mine && !(asker == Asker::kProgram && has_pieces))
        return false;
      blocked_calls_ += mine;
      changed_.notify_all();
      changed_.wait(lock);
      blocked_calls_ -= mine;
      return true;
    }
  }
  perform(*wait, asker);
  return true;
}

void TransferEngine::throw_no_memory(size_t size_bytes, uint64_t since,
                                     const std::exception_ptr& error) {
  const Lock lock(mutex_);
  if (is_closed_) throw StateError("the transfer engine was closed meanwhile");
  if (disk_error_ && disk_error_at_ >= since)
    std::rethrow_exception(std::exchange(disk_error_, nullptr));
  if (error) std::rethrow_exception(error);
  throw HostOutOfMemoryError(
      "the host budget of " + format_bytes(limit_bytes()) + " does not allow " +
          format_bytes(size_bytes) + " more: " + format_bytes(host_bytes_) +
          " are in use. Raise the budget (the argument host=), put less, or give the engine a "
          "disk (disk=)",
      size_bytes);
}

// Starts to write what the host alone has and is used last, after needed_at. False where there is
// nothing, or the disk refuses.
bool TransferEngine::start_write(uint64_t since, uint64_t needed_at) {
  DiskWork work;
  std::shared_ptr<CopyMark> left;
  std::byte* address = nullptr;
  {
    const Lock lock(mutex_);
    const auto is_writable = [&](const Chunk& chunk) {
      return chunk.residency.is_dirty() && !chunk.residency.is_dropped() &&
             chunk.disk_work == nullptr && chunk.write_failed_at < since &&
             (chunk.residency.host() == HostCopy::kValid || chunk.left != nullptr);
    };
    for (auto it = on_host_.rbegin(); it != on_host_.rend() && address == nullptr; ++it) {
      if (needed_at != kAnyUse && (*it)->next_use <= needed_at) return false;
      auto& chunks = (*it)->chunks;
      const auto found = std::find_if(chunks.begin(), chunks.end(), is_writable);
      if (found == chunks.end()) continue;
      work.ref = {(*it)->shared_from_this(), static_cast<size_t>(found - chunks.begin())};
      change(*found, [](Residency& residency) { residency.begin_writing(); });
      left = found->left;
      address = found->host.address();
    }
  }
  if (address == nullptr) return false;
  Chunk& chunk = work.ref.chunk();
  try {
    WriteGate gate;
    if (left != nullptr) gate = [left] { left->wait(); };
    WriteRequest request = disk_->write(address, chunk.size_bytes, std::move(gate));
    const Lock lock(mutex_);
    work.ticket = std::move(request.ticket);
    chunk.disk_work = work.ticket;
    chunk.stored = std::move(request.payload);
    writes_.push_back(std::move(work));
    announce();
    return true;
  } catch (...) {
    Garbage garbage;
    const Lock lock(mutex_);
    change(chunk, [](Residency& residency) { residency.writing_failed(); });
    chunk.write_failed_at = disk_error_at_ = requests_;
    disk_error_ = std::current_exception();
    ++counters_->disk_errors;
    settle(*work.ref.payload, chunk, garbage);
    announce();
    return false;
  }
}

// Begins writes before memory runs out, and not all at once: what is put later may have a farther
// next use.
void TransferEngine::write_behind() {
  if (disk_ == nullptr) return;
  uint64_t since = 0;
  {
    const Lock lock(mutex_);
    since = requests_;
  }
  for (;;) {
    {
      const Lock lock(mutex_);
      const size_t limit = limit_bytes();
      const size_t dirty_max = options_.host_bytes_max < limit ? 0 : limit - limit / 4;
      if (dirty_bytes_ <= dirty_max || writing_bytes_ >= options_.staging_bytes) return;
    }
    if (!start_write(since, kAnyUse)) return;
  }
}

// What will make memory free by itself. Called with the mutex held.
std::optional<TransferEngine::Wait> TransferEngine::find_wait() const {
  Wait wait;
  if (!writes_.empty()) {
    wait.write = writes_.front();
  } else if (!arrivals_.empty()) {
    wait.arrival = arrivals_.front().mark;
  } else if (!departures_.empty()) {
    wait.departure = departures_.front().mark;
  } else {
    const auto found = std::find_if(reads_.begin(), reads_.end(), [](const DiskWork& read) {
      return read.ref.chunk().residency.readers() == 0;
    });
    if (found == reads_.end()) return std::nullopt;
    wait.read = *found;
  }
  return wait;
}

// Blocks until something that is under way at all is over. False where nothing is.
bool TransferEngine::wait_for_anything() {
  std::optional<Wait> wait;
  {
    Lock lock(mutex_);
    wait = find_wait();
    if (!wait && !reads_.empty()) {
      wait.emplace();
      wait->read = reads_.front();
    }
    if (!wait && pieces_.empty() && serving_ == 0) return false;
    if (!wait) {
      ++blocked_calls_;
      changed_.notify_all();
      changed_.wait(lock);
      --blocked_calls_;
      return true;
    }
  }
  perform(*wait, Asker::kProgram);
  return true;
}

void TransferEngine::perform(const Wait& wait, Asker asker) {
  if (wait.write) {
    wait.write->ticket->wait_quietly();
    finish_write(*wait.write);
  } else if (wait.read) {
    wait.read->ticket->wait_quietly();
    static_cast<void>(finish_read(*wait.read));
  } else if (wait.arrival != nullptr) {
    wait.arrival->wait();
    finish_passed(wait.arrival, CopyDirection::kIn);
  } else {
    wait.departure->wait();
    finish_passed(wait.departure, CopyDirection::kOut);
  }
  if (asker == Asker::kProgram) collect();
}

// Takes a flight whose mark has passed off the books, and reads that have filled its chunks. Also
// for the engine's thread, which must not tell others that the mark has passed: see
// CopyMark::peek().
void TransferEngine::finish_passed(const std::shared_ptr<CopyMark>& mark, CopyDirection direction) {
  std::vector<DiskWork> reads;
  {
    Garbage garbage;
    const Lock lock(mutex_);
    auto& flights = direction == CopyDirection::kOut ? departures_ : arrivals_;
    const auto found = std::find_if(flights.begin(), flights.end(),
                                    [&](const Flight& flight) { return flight.mark == mark; });
    if (found == flights.end()) return;
    for (const ChunkRef& ref : found->chunks) {
      if (ref.chunk().residency.host() == HostCopy::kReading)
        reads.push_back({ref, ref.chunk().disk_work});
    }
    Flight flight = std::move(*found);
    flights.erase(found);
    finish_flight(std::move(flight), direction, garbage);
  }
  for (const DiskWork& read : reads) static_cast<void>(finish_read(read));
}

void TransferEngine::collect_arrivals_for_engine() {
  for (;;) {
    std::shared_ptr<CopyMark> first;
    {
      const Lock lock(mutex_);
      if (arrivals_.empty()) return;
      first = arrivals_.front().mark;
    }
    if (!first->peek()) return;
    finish_passed(first, CopyDirection::kIn);
  }
}

// Has something written that is used later, so that a later call finds room.
void TransferEngine::make_room_after(uint64_t needed_at) {
  uint64_t since = 0;
  {
    const Lock lock(mutex_);
    if (writing_bytes_ >= options_.staging_bytes) return;
    since = requests_;
  }
  start_write(since, needed_at);
}

// Starts to read what is used next, as far as memory is free or can be taken from what is used
// later.
void TransferEngine::prefetch() {
  if (disk_ == nullptr || options_.prefetch_bytes == 0) return;
  std::vector<std::pair<ChunkRef, uint64_t>> wanted;
  {
    const Lock lock(mutex_);
    Payload here;
    here.next_use = position_;
    size_t ahead_bytes = 0;
    for (auto it = by_use_.upper_bound(&here); it != by_use_.end(); ++it) {
      Payload& payload = **it;
      for (size_t index = 0; index < payload.chunks.size(); ++index) {
        ahead_bytes += payload.chunks[index].size_bytes;
        if (ahead_bytes > options_.prefetch_bytes) break;
        if (payload.chunks[index].residency.is_on_disk_only())
          wanted.push_back({{payload.shared_from_this(), index}, payload.next_use});
      }
      if (ahead_bytes > options_.prefetch_bytes) break;
    }
  }
  for (auto& [ref, next_use] : wanted) {
    std::optional<HostBuffer> host = try_acquire(ref.chunk().size_bytes, next_use, kLastRequest);
    if (!host) return make_room_after(next_use);
    try {
      if (start_read(ref, std::move(*host), nullptr))
        counters_->prefetched_bytes += ref.chunk().size_bytes;
    } catch (const std::exception&) {
      return;  // The fetch tries again, and hears what is wrong.
    }
  }
}

}  // namespace spillover
