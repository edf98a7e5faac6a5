// What the transfer engine knows: copies that are over, disk requests that are over, and who holds
// which memory. See transfer_engine.hpp.
#include "transfer/transfer_bookkeeping.hpp"

#include <algorithm>
#include <utility>

#include "base/check.hpp"
#include "driver/fork_guard.hpp"

namespace spillover {

// The bytes were counted when the memory was asked for.
void TransferEngine::take_host(Payload& payload, Chunk& chunk, HostBuffer&& host) {
  chunk.host = std::move(host);
  if (payload.host_chunks++ == 0) on_host_.insert(&payload);
}

void TransferEngine::release_host(Payload& payload, Chunk& chunk, Garbage& garbage) {
  if (chunk.host.address() == nullptr) return;
  garbage.hosts.push_back(std::move(chunk.host));
  chunk.host = HostBuffer();
  host_bytes_ -= chunk.size_bytes;
  if (--payload.host_chunks == 0) on_host_.erase(&payload);
  announce();
}

// Gives up what a dropped chunk holds once nothing of it is under way.
void TransferEngine::settle(Payload& payload, Chunk& chunk, Garbage& garbage) {
  SPILLOVER_CHECK(chunk.residency.is_valid(), "a chunk's copies do not fit together");
  if (!payload.is_dropped || !chunk.residency.is_over()) return;
  release_host(payload, chunk, garbage);
  if (chunk.stored != nullptr) garbage.stored.push_back(std::move(chunk.stored));
  chunk.stored = nullptr;
}

void TransferEngine::trace_flight(const Flight& flight, CopyDirection direction) noexcept {
  static constexpr TraceLabel kOut{"copy out", "transfer"};
  static constexpr TraceLabel kIn{"copy in", "transfer"};
  if (!trace_is_on()) return;
  const bool is_out = direction == CopyDirection::kOut;
  TraceEvent event;
  event.label = is_out ? &kOut : &kIn;
  event.track = (is_out ? out_track_ : in_track_).get();
  event.begin_ns = flight.issued_ns;
  event.end_ns = trace_now_ns();
  event.size_bytes = flight.copied_bytes;
  trace_record(event);
}

void TransferEngine::finish_flight(Flight&& flight, CopyDirection direction, Garbage& garbage) {
  trace_flight(flight, direction);
  for (const ChunkRef& ref : flight.chunks) {
    Chunk& chunk = ref.chunk();
    if (direction == CopyDirection::kIn) {
      change(chunk, [](Residency& residency) { residency.remove_reader(); });
    } else {
      change(chunk, [](Residency& residency) { residency.has_left(); });
      garbage.marks.push_back(std::move(chunk.left));
      chunk.left = nullptr;
    }
    settle(*ref.payload, chunk, garbage);
  }
  if (direction == CopyDirection::kOut) leaving_bytes_ -= flight.device_bytes;
  std::move(flight.owners.begin(), flight.owners.end(), std::back_inserter(released_));
  garbage.marks.push_back(std::move(flight.mark));
  announce();
}

void TransferEngine::collect_flights(CopyDirection direction) {
  auto& flights = direction == CopyDirection::kOut ? departures_ : arrivals_;
  Garbage garbage;
  for (;;) {
    std::shared_ptr<CopyMark> first;
    {
      const Lock lock(mutex_);
      if (flights.empty()) return;
      first = flights.front().mark;
    }
    if (!first->poll()) return;
    const Lock lock(mutex_);
    if (flights.empty() || flights.front().mark != first) continue;  // Another thread was faster.
    Flight flight = std::move(flights.front());
    flights.pop_front();
    finish_flight(std::move(flight), direction, garbage);
  }
}

void TransferEngine::collect_disk_work() {
  std::vector<DiskWork> writes;
  std::vector<DiskWork> reads;
  {
    const Lock lock(mutex_);
    if (writes_.empty() && reads_.empty()) return;
    writes = writes_;
    reads = reads_;
  }
  for (const DiskWork& work : writes) {
    if (work.ticket->is_done()) finish_write(work);
  }
  for (const DiskWork& work : reads) {
    if (work.ticket->is_done()) static_cast<void>(finish_read(work));
  }
}

namespace {

// The error of a request that is over.
std::exception_ptr error_of(const Ticket& ticket) noexcept {
  try {
    ticket.wait();
    return nullptr;
  } catch (...) {
    return std::current_exception();
  }
}

}  // namespace

// A write that fails costs nothing: the host's copy stays. Whoever needs its memory hears of it.
void TransferEngine::finish_write(const DiskWork& work) noexcept {
  const std::exception_ptr error = error_of(*work.ticket);
  Garbage garbage;
  const Lock lock(mutex_);
  Chunk& chunk = work.ref.chunk();
  if (chunk.disk_work != work.ticket) return;  // Another thread was faster.
  chunk.disk_work = nullptr;
  std::erase_if(writes_, [&](const DiskWork& other) { return other.ticket == work.ticket; });
  if (error) {
    change(chunk, [](Residency& residency) { residency.writing_failed(); });
    if (chunk.stored != nullptr) garbage.stored.push_back(std::move(chunk.stored));
    chunk.stored = nullptr;
    chunk.write_failed_at = disk_error_at_ = requests_;
    disk_error_ = error;
    ++counters_->disk_errors;
  } else {
    change(chunk, [](Residency& residency) { residency.has_written(); });
    counters_->written_bytes += chunk.size_bytes;
  }
  settle(*work.ref.payload, chunk, garbage);
  announce();
}

// The disk's copy stays whatever comes of it, so it can be tried again. Returns the error.
std::exception_ptr TransferEngine::finish_read(const DiskWork& work) noexcept {
  std::exception_ptr error = error_of(*work.ticket);
  Garbage garbage;
  const Lock lock(mutex_);
  Chunk& chunk = work.ref.chunk();
  if (chunk.disk_work != work.ticket) return error;  // Another thread was faster.
  chunk.disk_work = nullptr;
  std::erase_if(reads_, [&](const DiskWork& other) { return other.ticket == work.ticket; });
  if (error) {
    change(chunk, [](Residency& residency) { residency.reading_failed(); });
    release_host(*work.ref.payload, chunk, garbage);
    ++counters_->disk_errors;
  } else {
    change(chunk, [](Residency& residency) { residency.has_read(); });
    counters_->read_bytes += chunk.size_bytes;
  }
  settle(*work.ref.payload, chunk, garbage);
  announce();
  return error;
}

void TransferEngine::remove_reader(const ChunkRef& ref) noexcept {
  Garbage garbage;
  const Lock lock(mutex_);
  change(ref.chunk(), [](Residency& residency) { residency.remove_reader(); });
  settle(*ref.payload, ref.chunk(), garbage);
  announce();
}

// Called with the mutex held. The sets are sorted by what changes.
void TransferEngine::reorder(Payload& payload, uint64_t next_use) {
  const bool is_on_host = on_host_.erase(&payload) > 0;
  by_use_.erase(&payload);
  payload.next_use = next_use;
  if (is_on_host) on_host_.insert(&payload);
  if (next_use != Payload::kNoUse && !payload.is_dropped) by_use_.insert(&payload);
}

size_t TransferEngine::collect(size_t wanted_bytes) {
  check_not_forked();
  size_t before_bytes = 0;
  size_t departures = 0;
  {
    const Lock lock(mutex_);
    before_bytes = leaving_bytes_;
    departures = departures_.size();
  }
  const auto freed_bytes = [&] {
    const Lock lock(mutex_);
    return before_bytes - std::min(before_bytes, leaving_bytes_);
  };
  collect_flights(CopyDirection::kOut);
  // Those that others add meanwhile are not waited for.
  for (; wanted_bytes > 0 && departures > 0 && freed_bytes() < wanted_bytes; --departures) {
    std::shared_ptr<CopyMark> first;
    {
      const Lock lock(mutex_);
      if (departures_.empty()) break;
      first = departures_.front().mark;
    }
    if (!first->poll()) {
      const Stall stall(*counters_, StallCause::kCopy);
      first->wait();
    }
    collect_flights(CopyDirection::kOut);
  }
  collect_flights(CopyDirection::kIn);
  collect_disk_work();
  return freed_bytes();
}

std::vector<MemoryOwner> TransferEngine::take_released() {
  std::vector<MemoryOwner> taken;
  const Lock lock(mutex_);
  taken.swap(released_);
  return taken;
}

}  // namespace spillover
