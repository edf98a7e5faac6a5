// Fetches: what the host has goes to the device at once, and what the disk has once the engine's
// thread has waited for it. See transfer_engine.hpp.
#include <pthread.h>

#include <algorithm>
#include <array>
#include <iterator>
#include <utility>

#include "base/error.hpp"
#include "driver/context.hpp"
#include "driver/fork_guard.hpp"
#include "transfer/transfer_bookkeeping.hpp"

namespace spillover {

std::shared_ptr<TransferTicket> TransferEngine::fetch(const std::vector<FetchTarget>& wanted,
                                                      StreamHandle after, int priority) {
  check_not_forked();
  if (wanted.empty()) throw ConfigError("there is nothing to fetch");
  const ActiveCall call(*this);
  const ContextScope context(options_.device);
  collect();
  const std::shared_ptr<CopyMark> ready = record_ready(after);
  size_t chunks = 0;
  for (const FetchTarget& each : wanted) {
    check_mine(*each.payload);
    if (each.target.size_bytes < each.payload->size_bytes) {
      throw ConfigError("the target has " + format_bytes(each.target.size_bytes) +
                        " and the payload " + format_bytes(each.payload->size_bytes));
    }
    chunks += each.payload->chunks.size();
  }
  auto ticket = std::make_shared<TransferTicket>(counters_, chunks);
  std::vector<Piece> later;
  std::vector<Piece> now = claim(wanted, ticket, ready, later);
  try {
    issue_all(now);
    now.clear();
    start_first_reads(later);
    enqueue(later, priority);
  } catch (...) {
    give_up(now, std::current_exception());
    give_up(later, std::current_exception());
    throw;
  }
  ++counters_->in_transfers;
  prefetch();
  return ticket;
}

// Adds a reader to each chunk. Gives those that can be copied now, and in `later` the others.
std::vector<TransferEngine::Piece> TransferEngine::claim(
    const std::vector<FetchTarget>& wanted, const std::shared_ptr<TransferTicket>& ticket,
    const std::shared_ptr<CopyMark>& ready, std::vector<Piece>& later) {
  std::vector<Piece> now;
  const Lock lock(mutex_);
  for (const FetchTarget& each : wanted) {
    if (each.payload->is_dropped)
      throw StateError("the payload was dropped, or its transfer was cancelled");
  }
  for (const FetchTarget& each : wanted) {
    Payload& payload = *each.payload;
    counters_->in_bytes += payload.size_bytes;
    if (payload.next_use != Payload::kNoUse) {
      position_ = std::max(position_, payload.next_use);
      reorder(payload, Payload::kNoUse);
    }
    for (size_t index = 0; index < payload.chunks.size(); ++index) {
      Chunk& chunk = payload.chunks[index];
      change(chunk, [](Residency& residency) { residency.add_reader(); });
      ++(chunk.residency.is_on_disk_only() ? counters_->host_misses : counters_->host_hits);
      Piece piece{{each.payload, index},
                  each.target.address + chunk.offset_bytes,
                  ticket,
                  ready,
                  each.target.owner};
      if (chunk.residency.host() == HostCopy::kReading && chunk.disk_work != nullptr)
        ticket->reads(chunk.disk_work);
      (chunk.residency.is_at_hand() ? now : later).push_back(std::move(piece));
    }
  }
  return now;
}

// In batches, as copies out are. Takes those that it has issued out of pieces.
void TransferEngine::issue_all(std::vector<Piece>& pieces) {
  while (!pieces.empty()) {
    size_t count = 0;
    size_t batch_bytes = 0;
    while (count < pieces.size() && batch_bytes < options_.chunk_bytes)
      batch_bytes += pieces[count++].ref.chunk().size_bytes;
    issue(std::span(pieces).first(count));
    pieces.erase(pieces.begin(), pieces.begin() + static_cast<std::ptrdiff_t>(count));
  }
}

// Puts pieces of one ticket on the copy-in stream. Where it throws none of them is there any more,
// and they still have their readers.
void TransferEngine::issue(std::span<Piece> pieces) {
  std::vector<HostDeviceCopy> copies;
  std::vector<std::shared_ptr<CopyMark>> left;
  Flight flight;
  {
    const Lock lock(mutex_);
    for (const Piece& piece : pieces) {
      const Chunk& chunk = piece.ref.chunk();
      copies.push_back({chunk.host.address(), piece.target, chunk.size_bytes});
      if (chunk.left != nullptr && (left.empty() || left.back() != chunk.left))
        left.push_back(chunk.left);
      flight.chunks.push_back(piece.ref);
      flight.device_bytes += chunk.size_bytes;
      if (flight.owners.empty() || flight.owners.back() != piece.owner)
        flight.owners.push_back(piece.owner);
    }
  }
  const Stream& stream = streams_.in();
  flight.copied_bytes = flight.device_bytes;
  flight.issued_ns = trace_now_ns();
  try {
    stream.wait(pieces.front().ready->event());
    for (const auto& mark : left) stream.wait(mark->event());
    copy_to_device(copies, stream);
    flight.mark = marks_->record(stream.handle());
  } catch (...) {
    stream.settle();
    throw;
  }
  const std::shared_ptr<CopyMark> mark = flight.mark;
  streams_.count(CopyDirection::kIn, flight.copied_bytes);
  {
    const Lock lock(mutex_);
    arrivals_.push_back(std::move(flight));
    announce();
  }
  pieces.front().ticket->issued(pieces.size(), mark);
}

// Reads a chunk into memory that was asked for. False where somebody else does already. Throws what
// the disk store throws; the chunk is as before then. Blocks while the disk's queue is full.
bool TransferEngine::start_read(const ChunkRef& ref, HostBuffer&& host, TransferTicket* ticket) {
  Chunk& chunk = ref.chunk();
  std::shared_ptr<DiskPayload> stored;
  {
    Garbage garbage;
    const Lock lock(mutex_);
    if (!chunk.residency.is_on_disk_only() ||
        (chunk.residency.is_dropped() && chunk.residency.readers() == 0)) {
      host_bytes_ -= chunk.size_bytes;
      garbage.hosts.push_back(std::move(host));
      return false;
    }
    change(chunk, [](Residency& residency) { residency.begin_reading(); });
    take_host(*ref.payload, chunk, std::move(host));
    stored = chunk.stored;
  }
  try {
    std::shared_ptr<Ticket> read = disk_->read(stored, chunk.host.address());
    const Lock lock(mutex_);
    chunk.disk_work = read;
    reads_.push_back({ref, read});
    announce();
    if (ticket != nullptr) ticket->reads(std::move(read));
    return true;
  } catch (...) {
    Garbage garbage;
    const Lock lock(mutex_);
    change(chunk, [](Residency& residency) { residency.reading_failed(); });
    release_host(*ref.payload, chunk, garbage);
    settle(*ref.payload, chunk, garbage);
    ++counters_->disk_errors;
    announce();
    throw;
  }
}

// Asks the disk for as much as memory is free for, at least for one piece: see Note [Time of
// detached work]. The others are read by the engine's thread, as memory becomes free. So are all,
// once something is read for them: its memory comes back only when they are enqueued.
void TransferEngine::start_first_reads(std::span<Piece> pieces) {
  const auto is_any_moving = [&] {
    const Lock lock(mutex_);
    return std::any_of(pieces.begin(), pieces.end(), [](const Piece& piece) {
      return !piece.ref.chunk().residency.is_on_disk_only();
    });
  };
  for (Piece& piece : pieces) {
    const Chunk& chunk = piece.ref.chunk();
    {
      const Lock lock(mutex_);
      if (!chunk.residency.is_on_disk_only()) continue;
    }
    std::optional<HostBuffer> host = try_acquire(chunk.size_bytes, kAnyUse, kLastRequest);
    if (!host) host = acquire_unless(chunk.size_bytes, is_any_moving);
    if (!host) return;
    start_read(piece.ref, std::move(*host), piece.ticket.get());
  }
}

void TransferEngine::enqueue(std::vector<Piece>& pieces, int priority) {
  if (pieces.empty()) return;
  const Lock lock(mutex_);
  if (thread_ == nullptr) thread_ = std::make_unique<std::thread>([this] { serve(); });
  const uint64_t fetch = ++fetches_made_;
  for (size_t i = 0; i < pieces.size(); ++i)
    pieces_.emplace(PieceKey{-int64_t{priority}, fetch, i}, std::move(pieces[i]));
  pieces.clear();
  announce();
}

// For pieces that are in nobody's hands any more.
void TransferEngine::give_up(std::span<Piece> pieces, const std::exception_ptr& error) noexcept {
  for (Piece& piece : pieces) {
    remove_reader(piece.ref);
    piece.ticket->fail(1, error);
    const Lock lock(mutex_);
    released_.push_back(std::move(piece.owner));
  }
}

bool TransferEngine::cancel(const std::shared_ptr<TransferTicket>& ticket) {
  check_not_forked();
  if (!ticket->cancel()) return false;
  std::vector<Piece> pieces;
  {
    const Lock lock(mutex_);
    for (auto it = pieces_.begin(); it != pieces_.end();) {
      if (it->second.ticket != ticket) {
        ++it;
        continue;
      }
      pieces.push_back(std::move(it->second));
      it = pieces_.erase(it);
    }
  }
  give_up(pieces, nullptr);
  return true;
}

// The engine's thread. It has pieces in order of their keys; those that the disk is at first, since
// the others cannot be helped.
void TransferEngine::serve() noexcept {
  pthread_setname_np(pthread_self(), "spillover-fetch");
  const RelaxedCaptureScope relaxed;
  Lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return is_stopping_ || !pieces_.empty(); });
    if (pieces_.empty()) return;
    lock.unlock();
    start_waiting_reads();
    lock.lock();
    serve_one(lock);
  }
}

// Called with the mutex held, which it lets go of while it waits.
void TransferEngine::serve_one(Lock& lock) {
  const auto is_moving = [](const auto& item) {
    const Chunk& chunk = item.second.ref.chunk();
    return chunk.residency.is_at_hand() || chunk.disk_work != nullptr;
  };
  const auto is_to_be_read = [](const auto& item) {
    return item.second.ref.chunk().residency.is_on_disk_only();
  };
  auto found = std::find_if(pieces_.begin(), pieces_.end(), is_moving);
  if (found == pieces_.end()) found = std::find_if(pieces_.begin(), pieces_.end(), is_to_be_read);
  if (found == pieces_.end()) {
    // Somebody is about to read, or has just found that he cannot.
    if (!pieces_.empty()) changed_.wait(lock);
    return;
  }
  const PieceKey key = found->first;
  std::array<Piece, 1> piece{std::move(found->second)};
  pieces_.erase(found);
  ++serving_;
  lock.unlock();
  PieceOutcome outcome = PieceOutcome::kOver;
  std::exception_ptr error;
  try {
    outcome = serve_piece(piece);
  } catch (...) {
    error = std::current_exception();
  }
  // Without the mutex: an owner may need a lock that is held by who waits for the mutex, as
  // Python's do.
  if (outcome == PieceOutcome::kOver && !error) piece[0] = Piece{};
  lock.lock();
  if (outcome == PieceOutcome::kWaits && !is_closed_ && !piece[0].ticket->is_cancelled()) {
    pieces_.emplace(key, std::move(piece[0]));
  } else if (outcome == PieceOutcome::kWaits || error) {
    lock.unlock();
    if (!error) error = std::make_exception_ptr(StateError("the transfer engine was closed"));
    give_up(piece, error);
    lock.lock();
  }
  --serving_;
  changed_.notify_all();
}

TransferEngine::PieceOutcome TransferEngine::serve_piece(std::span<Piece> piece) {
  const ChunkRef& ref = piece.front().ref;
  Chunk& chunk = ref.chunk();
  DiskWork read{ref, nullptr};
  bool is_to_be_read = false;
  {
    const Lock lock(mutex_);
    is_to_be_read = chunk.residency.is_on_disk_only();
    if (chunk.residency.host() == HostCopy::kReading) read.ticket = chunk.disk_work;
    if (!is_to_be_read && !chunk.residency.is_at_hand() && read.ticket == nullptr)
      return PieceOutcome::kWaits;
  }
  if (piece.front().ticket->is_cancelled()) return PieceOutcome::kWaits;
  if (is_to_be_read) {
    // One attempt: by then there may be pieces that can be issued, which is what frees memory.
    const uint64_t since = next_request();
    const uint64_t seen = changes();
    std::exception_ptr error;
    if (auto host = try_acquire(chunk.size_bytes, kAnyUse, since, &error))
      start_read(ref, std::move(*host), piece.front().ticket.get());
    else if (!help_to_memory(chunk.size_bytes, since, Asker::kEngine) && changes() == seen)
      throw_no_memory(chunk.size_bytes, since, error);
    return PieceOutcome::kWaits;
  }
  if (read.ticket != nullptr) {
    try {
      read.ticket->wait();
    } catch (...) {
      static_cast<void>(finish_read(read));
      throw;
    }
  }
  issue(piece);
  return PieceOutcome::kOver;
}

// As many as there is memory for. What goes wrong here shows again when the piece's turn comes.
void TransferEngine::start_waiting_reads() {
  std::vector<std::pair<ChunkRef, std::shared_ptr<TransferTicket>>> waiting;
  {
    const Lock lock(mutex_);
    for (const auto& [key, piece] : pieces_) {
      if (waiting.size() == kWaitingReadsMax) break;
      if (piece.ref.chunk().residency.is_on_disk_only())
        waiting.emplace_back(piece.ref, piece.ticket);
    }
  }
  for (const auto& [ref, ticket] : waiting) {
    std::optional<HostBuffer> host = try_acquire(ref.chunk().size_bytes, kAnyUse, kLastRequest);
    if (!host) {
      collect_arrivals_for_engine();
      host = try_acquire(ref.chunk().size_bytes, kAnyUse, kLastRequest);
    }
    if (!host) return;
    try {
      start_read(ref, std::move(*host), ticket.get());
    } catch (const std::exception&) {
      return;
    }
  }
}

}  // namespace spillover
