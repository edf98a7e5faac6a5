#include "transfer/transfer_engine.hpp"

#include <algorithm>
#include <atomic>
#include <iterator>
#include <string>
#include <utility>

#include "base/check.hpp"
#include "base/error.hpp"
#include "driver/context.hpp"
#include "driver/device.hpp"
#include "driver/fork_guard.hpp"
#include "driver/stream.hpp"
#include "transfer/transfer_bookkeeping.hpp"

namespace spillover {
namespace {

void check_options(const TransferOptions& options, const DiskStore* disk) {
  if (options.chunk_bytes == 0) throw ConfigError("chunk must be at least a byte");
  if (disk == nullptr && options.host_bytes_max == 0) {
    throw ConfigError("host=0 without a disk leaves no place for a payload; give one of them");
  }
  if (disk != nullptr && options.staging_bytes < 2 * options.chunk_bytes) {
    throw ConfigError("staging must be at least twice chunk, so that the disk and the device can " +
                      std::string("work at once: ") + format_bytes(options.staging_bytes) +
                      " are less than twice " + format_bytes(options.chunk_bytes));
  }
}

uint64_t next_engine_number() {
  static std::atomic<uint64_t> last{0};
  return ++last;
}

}  // namespace

std::shared_ptr<TransferEngine> TransferEngine::create(const TransferOptions& options,
                                                       std::shared_ptr<HostPool> pool,
                                                       DiskStore* disk) {
  check_options(options, disk);
  require_device(options.device);
  return std::shared_ptr<TransferEngine>(new TransferEngine(options, std::move(pool), disk));
}

TransferEngine::TransferEngine(const TransferOptions& options, std::shared_ptr<HostPool> pool,
                               DiskStore* disk)
    : number_(next_engine_number()),
      options_(options),
      pool_(std::move(pool)),
      disk_(disk),
      streams_(CopyStreams::of(options.device)),
      marks_(std::make_shared<CopyMarks>(options.device)),
      counters_(std::make_shared<TransferCounters>()),
      out_track_(TrackKind::kLanes, "copy out of device " + std::to_string(options.device)),
      in_track_(TrackKind::kLanes, "copy into device " + std::to_string(options.device)) {}

TransferEngine::~TransferEngine() {
  close();
  if (in_forked_child()) static_cast<void>(thread_.release());
}

// The mark of what is on a stream now.
std::shared_ptr<CopyMark> TransferEngine::record_ready(StreamHandle after) {
  if (stream_is_capturing(after)) {
    throw StateError("nothing can be transferred after a stream that records a CUDA graph");
  }
  return marks_->record(after);
}

std::shared_ptr<Payload> TransferEngine::make_payload(size_t size_bytes, uint64_t next_use) {
  auto payload = std::make_shared<Payload>();
  payload->engine = number_;
  payload->size_bytes = size_bytes;
  // Without a disk there is nothing that parts of it could be given to.
  const size_t chunk_bytes = disk_ == nullptr ? size_bytes : options_.chunk_bytes;
  payload->chunks.resize((size_bytes + chunk_bytes - 1) / chunk_bytes);
  size_t offset = 0;
  for (Chunk& chunk : payload->chunks) {
    chunk.offset_bytes = offset;
    chunk.size_bytes = std::min(chunk_bytes, size_bytes - offset);
    offset += chunk.size_bytes;
  }
  const Lock lock(mutex_);
  payload->number = ++payloads_made_;
  reorder(*payload, next_use);
  return payload;
}

void TransferEngine::check_mine(const Payload& payload) const {
  if (payload.engine == number_) return;
  throw StateError("the payload is another engine's, which alone can fetch it");
}

// Blocks while copies out hold more device memory than their budget, which a lone one may.
void TransferEngine::wait_for_departures(size_t size_bytes) {
  for (;;) {
    std::shared_ptr<CopyMark> first;
    {
      const Lock lock(mutex_);
      if (departures_.empty() || leaving_bytes_ + size_bytes <= options_.leaving_bytes_max) return;
      first = departures_.front().mark;
    }
    if (!first->poll()) {
      const Stall stall(*counters_, StallCause::kCopy);
      first->wait();
    }
    collect_flights(CopyDirection::kOut);
  }
}

TransferEngine::PutResult TransferEngine::put(std::vector<PutSource> sources, StreamHandle after) {
  check_not_forked();
  const ActiveCall call(*this);
  const ContextScope context(options_.device);
  collect();
  if (sources.empty()) throw ConfigError("there is nothing to put");
  PutResult result;
  size_t size_bytes = 0;
  for (const PutSource& source : sources) {
    if (source.range.size_bytes == 0) throw ConfigError("a payload must have at least one byte");
    size_bytes += source.range.size_bytes;
  }
  result.ticket = std::make_shared<TransferTicket>(counters_, 1);
  const std::shared_ptr<CopyMark> ready = record_ready(after);
  wait_for_departures(size_bytes);
  try {
    for (const PutSource& source : sources)
      result.payloads.push_back(make_payload(source.range.size_bytes, source.next_use));
    put_chunks(result, sources, ready);
  } catch (...) {
    for (const auto& payload : result.payloads) drop(payload);
    collect_flights(CopyDirection::kOut);  // All are over.
    throw;
  }
  counters_->out_bytes += size_bytes;
  ++counters_->out_transfers;
  write_behind();
  return result;
}

// Small payloads share a batch, and with it a mark; large ones get one for each chunk, so that the
// disk can have the first while the next are copied.
void TransferEngine::put_chunks(const PutResult& result, std::vector<PutSource>& sources,
                                const std::shared_ptr<CopyMark>& ready) {
  streams_.out().wait(ready->event());
  Departure batch;
  try {
    for (size_t i = 0; i < sources.size(); ++i) {
      const std::shared_ptr<Payload>& payload = result.payloads[i];
      for (size_t index = 0; index < payload->chunks.size(); ++index) {
        const bool is_last_chunk = index + 1 == payload->chunks.size();
        add_to_batch(batch, {payload, index}, sources[i].range.address);
        // Its memory is held until the last of its copies is over.
        if (is_last_chunk) batch.add_owner(std::move(sources[i].range.owner), payload->size_bytes);
        const bool is_last = is_last_chunk && i + 1 == sources.size();
        if (batch.size_bytes >= options_.chunk_bytes && !is_last) {
          depart(batch, nullptr);
          write_behind();
        }
      }
    }
    depart(batch, result.ticket.get());
  } catch (...) {
    undo_departure(batch);
    throw;
  }
}

void TransferEngine::add_to_batch(Departure& batch, const ChunkRef& ref, DeviceAddress source) {
  Chunk& chunk = ref.chunk();
  batch.chunks.reserve(batch.chunks.size() + 1);
  batch.copies.reserve(batch.copies.size() + 1);
  std::optional<HostBuffer> host = try_acquire(chunk.size_bytes, kAnyUse, kLastRequest);
  if (!host) {
    // What can be made free may be waiting for these very copies.
    if (!batch.chunks.empty()) depart(batch, nullptr);
    host = acquire(chunk.size_bytes);
  }
  batch.size_bytes += chunk.size_bytes;
  batch.copies.push_back({host->address(), source + chunk.offset_bytes, chunk.size_bytes});
  batch.chunks.push_back(ref);
  const Lock lock(mutex_);
  change(chunk, [](Residency& residency) { residency.begin_leaving(); });
  take_host(*ref.payload, chunk, std::move(*host));
}

// Puts a batch on the stream; it is empty then.
void TransferEngine::depart(Departure& batch, TransferTicket* ticket) {
  const int64_t issued_ns = trace_now_ns();
  copy_to_host(batch.copies, streams_.out());
  const std::shared_ptr<CopyMark> mark = marks_->record(streams_.out().handle());
  streams_.count(CopyDirection::kOut, batch.size_bytes);
  {
    const Lock lock(mutex_);
    for (const ChunkRef& ref : batch.chunks) ref.chunk().left = mark;
    leaving_bytes_ += batch.device_bytes;
    departures_.push_back({mark, std::move(batch.chunks), std::move(batch.owners),
                           batch.device_bytes, batch.size_bytes, issued_ns});
    announce();
  }
  batch = Departure();
  if (ticket != nullptr) ticket->issued(1, mark);
}

// After a failure: some copies may be on the stream without a mark, or without the owner of what
// they read.
void TransferEngine::undo_departure(Departure& batch) noexcept {
  streams_.out().settle();
  Garbage garbage;
  const Lock lock(mutex_);
  for (const ChunkRef& ref : batch.chunks) {
    change(ref.chunk(), [](Residency& residency) { residency.leaving_failed(); });
    release_host(*ref.payload, ref.chunk(), garbage);
  }
  std::move(batch.owners.begin(), batch.owners.end(), std::back_inserter(released_));
}

std::shared_ptr<TransferTicket> TransferEngine::copy(std::vector<PinnedCopy> copies,
                                                     CopyDirection direction, StreamHandle after) {
  check_not_forked();
  if (copies.empty()) throw ConfigError("there is nothing to copy");
  const ActiveCall call(*this);
  const ContextScope context(options_.device);
  collect();
  Flight flight;
  std::vector<HostDeviceCopy> batch;
  for (PinnedCopy& copy : copies) {
    batch.push_back({copy.host, copy.device.address, copy.device.size_bytes});
    flight.device_bytes += copy.device.size_bytes;
    flight.owners.push_back(std::move(copy.device.owner));
    flight.owners.push_back(std::move(copy.host_owner));
  }
  const bool is_out = direction == CopyDirection::kOut;
  const Stream& stream = streams_.stream(direction);
  const std::shared_ptr<CopyMark> ready = record_ready(after);
  if (is_out) wait_for_departures(flight.device_bytes);
  auto ticket = std::make_shared<TransferTicket>(counters_, 1);
  stream.wait(ready->event());
  try {
    flight.copied_bytes = flight.device_bytes;
    flight.issued_ns = trace_now_ns();
    if (is_out) copy_to_host(batch, stream);
    if (!is_out) copy_to_device(batch, stream);
    flight.mark = marks_->record(stream.handle());
  } catch (...) {
    stream.settle();
    throw;
  }
  ticket->issued(1, flight.mark);
  streams_.count(direction, flight.device_bytes);
  (is_out ? counters_->out_bytes : counters_->in_bytes) += flight.device_bytes;
  ++(is_out ? counters_->out_transfers : counters_->in_transfers);
  const Lock lock(mutex_);
  if (is_out) leaving_bytes_ += flight.device_bytes;
  (is_out ? departures_ : arrivals_).push_back(std::move(flight));
  announce();
  return ticket;
}

void TransferEngine::drop(const std::shared_ptr<Payload>& payload) noexcept {
  if (in_forked_child()) return;
  Garbage garbage;
  const Lock lock(mutex_);
  if (payload->is_dropped) return;
  by_use_.erase(payload.get());
  payload->is_dropped = true;
  for (Chunk& chunk : payload->chunks) {
    change(chunk, [](Residency& residency) { residency.drop(); });
    settle(*payload, chunk, garbage);
  }
}

void TransferEngine::set_next_use(const std::shared_ptr<Payload>& payload, uint64_t next_use) {
  check_not_forked();
  check_mine(*payload);
  const Lock lock(mutex_);
  if (!payload->is_dropped) reorder(*payload, next_use);
}

void TransferEngine::advance(uint64_t position) {
  check_not_forked();
  const ActiveCall call(*this);
  collect();
  {
    const Lock lock(mutex_);
    position_ = position;
  }
  prefetch();
}

uint64_t TransferEngine::position() const {
  const Lock lock(mutex_);
  return position_;
}

void TransferEngine::synchronize() {
  check_not_forked();
  const ActiveCall call(*this);
  for (;;) {
    collect();
    if (wait_for_anything()) continue;
    const Lock lock(mutex_);
    if (const std::exception_ptr error = std::exchange(disk_error_, nullptr))
      std::rethrow_exception(error);
    return;
  }
}

void TransferEngine::close() noexcept {
  // A forked child has neither the threads nor, for what it knows, a lock that is free.
  if (in_forked_child()) return;
  const std::lock_guard closing(close_mutex_);
  const auto error =
      std::make_exception_ptr(StateError("the transfer engine was closed meanwhile"));
  Lock lock(mutex_);
  is_closed_ = true;
  changed_.notify_all();
  // Calls under way may add pieces yet, and wait for memory that pieces hold.
  while (!pieces_.empty() || active_calls_ > 0) {
    std::vector<Piece> pieces;
    pieces.reserve(pieces_.size());
    for (auto& [key, piece] : pieces_) pieces.push_back(std::move(piece));
    pieces_.clear();
    lock.unlock();
    give_up(pieces, error);
    lock.lock();
    if (pieces_.empty() && active_calls_ > 0) changed_.wait(lock);
  }
  is_stopping_ = true;
  changed_.notify_all();
  lock.unlock();
  if (thread_ != nullptr && thread_->joinable()) thread_->join();
  drain();
}

// Nobody makes calls any more, and the thread has ended.
void TransferEngine::drain() noexcept {
  for (const CopyDirection direction : {CopyDirection::kOut, CopyDirection::kIn}) {
    for (;;) {
      std::shared_ptr<CopyMark> first;
      {
        const Lock lock(mutex_);
        const auto& flights = direction == CopyDirection::kOut ? departures_ : arrivals_;
        if (flights.empty()) break;
        first = flights.front().mark;
      }
      first->settle();
      collect_flights(direction);
    }
  }
  std::vector<DiskWork> works;
  {
    const Lock lock(mutex_);
    works = writes_;
    works.insert(works.end(), reads_.begin(), reads_.end());
  }
  for (const DiskWork& work : works) {
    work.ticket->wait_quietly();
    if (work.ref.chunk().residency.disk() == DiskCopy::kWriting)
      finish_write(work);
    else
      static_cast<void>(finish_read(work));
  }
}

TransferStats TransferEngine::stats() const {
  check_not_forked();
  const Lock lock(mutex_);
  return {*counters_,         host_bytes_,     host_bytes_peak_, dirty_bytes_,
          leaving_bytes_,     writing_bytes_,  reading_bytes_,   pieces_.size() + serving_,
          departures_.size(), arrivals_.size()};
}

size_t TransferEngine::leaving_bytes() const {
  check_not_forked();
  const Lock lock(mutex_);
  return leaving_bytes_;
}

const char* TransferEngine::describe(const std::shared_ptr<Payload>& payload) const {
  check_not_forked();
  const Lock lock(mutex_);
  // Where chunks differ, the one that is not where the others are going yet.
  const Chunk* first = &payload->chunks.front();
  for (const Chunk& chunk : payload->chunks) {
    if (chunk.disk_work != nullptr || chunk.left != nullptr) first = &chunk;
  }
  return first->residency.name();
}

}  // namespace spillover
