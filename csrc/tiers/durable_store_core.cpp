#include "tiers/durable_store_core.hpp"

#include <unistd.h>

#include <utility>

#include "base/error.hpp"
#include "tiers/extent_io.hpp"
#include "tiers/work_annotation.hpp"

namespace spillover {
namespace {

std::vector<BlockFile> files_of(const OpenDurable& store) {
  std::vector<BlockFile> files;
  for (const auto& folder : store.folders) files.push_back(folder->file());
  return files;
}

// The same error with the entry's name in front, where it is about the data.
std::exception_ptr named(const std::exception_ptr& error, const std::string& entry) {
  try {
    std::rethrow_exception(error);
  } catch (const CorruptDataError& corrupt) {
    return std::make_exception_ptr(CorruptDataError("entry '" + entry + "': " + corrupt.what(),
                                                    corrupt.path(), corrupt.native_error()));
  } catch (...) {
    return error;
  }
}

}  // namespace

DurableStoreCore::DurableStoreCore(const DurableStoreOptions& options)
    : options_(options), owner_(getpid()), write_limit_(options.write_limit_bytes) {
  const EngineOptions engine{options.engine, options.threads_per_folder, options.queue_length_max};
  check_engine_options(engine);
  store_ = open_durable(options.store);
  states_.resize(store_.manifest.extents.size());
  for (size_t i = 0; i < states_.size(); ++i) {
    const DurableManifest::Extent& extent = store_.manifest.extents[i];
    states_[i].committed = extent.slot;
    if (extent.slot != kNoSlot) states_[i].crc32c[extent.slot] = extent.crc32c;
  }
  unsynced_.resize(store_.folders.size(), false);
  engines_ = std::make_unique<EngineSet>(files_of(store_), *this, engine);
}

DurableStoreCore::~DurableStoreCore() {
  close();
  if (getpid() == owner_) return;
  for (const auto& folder : store_.folders) folder->leave_to_parent();
}

void DurableStoreCore::close() noexcept {
  if (getpid() != owner_) return;
  const std::lock_guard exclusive(exclusive_mutex_);
  is_closed_ = true;
  engines_->close();
  for (const auto& folder : store_.folders) folder->close();
}

void DurableStoreCore::check_open() const {
  if (is_closed_) throw StateError("the durable store is closed");
  if (getpid() != owner_) {
    throw StateError("a durable store cannot be used in a forked child: its parent has it");
  }
}

void DurableStoreCore::check_not_failed() const {
  if (!failure_) return;
  try {
    std::rethrow_exception(failure_);
  } catch (const StorageError& error) {
    throw StorageError(std::string("the durable store takes no more writes, because a commit "
                                   "failed: ") +
                           error.what() +
                           ". What was committed can be read; close the store and open it again",
                       error.path(), error.native_error());
  }
}

Extent DurableStoreCore::extent_at(size_t index, size_t slot) const {
  const DurableLayout::ExtentPlace& place = layout().extents()[index];
  return {place.folder, place.offsets[slot], place.size_bytes, states_[index].crc32c[slot]};
}

void DurableStoreCore::check_writable(size_t index) const {
  const State& state = states_[index];
  if (state.fresh == Fresh::kWriting || state.readers[state.fresh_slot()] > 0) {
    throw StateError("the entry '" + layout().name_of(index) + "' is being " +
                     (state.fresh == Fresh::kWriting ? "written" : "read") +
                     " there; wait for that ticket before it is written again");
  }
}

std::shared_ptr<Ticket> DurableStoreCore::write(const DurableStore::Part& part, std::byte* data,
                                                WriteGate gate) {
  check_open();
  const auto range = layout().part(layout().find(part.entry), part.offset, part.size_bytes);
  auto ticket = std::make_shared<Ticket>(range.count, waits_);
  std::vector<DiskPiece> pieces;
  pieces.reserve(range.count);
  {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return !is_quiet_; });
    check_open();
    check_not_failed();
    for (size_t i = range.first; i < range.first + range.count; ++i) check_writable(i);
    write_limit_.add(part.size_bytes, store_.folders.front()->path());
    for (size_t i = range.first; i < range.first + range.count; ++i) {
      State& state = states_[i];
      const Extent extent = extent_at(i, state.fresh_slot());
      pieces.push_back({TransferDirection::kWrite, extent, data, nullptr, i, ticket});
      data += extent.size_bytes;
      state.fresh = Fresh::kWriting;
      unsynced_[extent.folder] = true;
    }
    pending_writes_ += range.count;
    pending_extents_ += range.count;
  }
  engines_->submit(std::move(pieces), std::move(gate));
  return ticket;
}

size_t DurableStoreCore::slot_to_read(size_t index, DurableContents contents) const {
  const State& state = states_[index];
  const std::string entry = "the entry '" + layout().name_of(index) + "' ";
  if (contents == DurableContents::kNewest && state.fresh != Fresh::kNothing) {
    if (state.fresh == Fresh::kWriting) {
      throw StateError(entry + "is still being written; wait for the write's ticket first");
    }
    if (state.fresh == Fresh::kFailed) {
      throw StateError(entry +
                       "was not stored: its write failed. Write it again, or go back to "
                       "the last commit with rollback()");
    }
    return state.fresh_slot();
  }
  if (state.committed == kNoSlot) {
    throw StateError(entry + (contents == DurableContents::kNewest
                                  ? "has no contents: it was never written"
                                  : "has no committed contents"));
  }
  return state.committed;
}

std::shared_ptr<Ticket> DurableStoreCore::read(const DurableStore::Part& part, std::byte* data,
                                               DurableContents contents) {
  check_open();
  const auto range = layout().part(layout().find(part.entry), part.offset, part.size_bytes);
  auto ticket = std::make_shared<Ticket>(range.count, waits_);
  std::vector<DiskPiece> pieces;
  pieces.reserve(range.count);
  {
    const std::lock_guard lock(mutex_);
    for (size_t i = range.first; i < range.first + range.count; ++i) {
      const Extent extent = extent_at(i, slot_to_read(i, contents));
      pieces.push_back({TransferDirection::kRead, extent, data, nullptr, i, ticket});
      data += extent.size_bytes;
    }
    for (const DiskPiece& piece : pieces) {
      ++states_[piece.index].readers[slot_to_read(piece.index, contents)];
    }
    pending_extents_ += range.count;
  }
  engines_->submit(std::move(pieces), nullptr);
  return ticket;
}

// The state is settled before anybody who waits for the ticket can look.
void DurableStoreCore::finish(DiskPiece& piece, std::exception_ptr error) noexcept {
  engines_->note_end(piece, error != nullptr);
  const DurableLayout::ExtentPlace& place = layout().extents()[piece.index];
  if (error) error = named(error, layout().name_of(piece.index));
  {
    const std::lock_guard lock(mutex_);
    State& state = states_[piece.index];
    const size_t slot = piece.extent.offset == place.offsets[0] ? 0 : 1;
    if (piece.direction == TransferDirection::kRead) {
      --state.readers[slot];
      if (!error) read_bytes_ += piece.extent.size_bytes;
    } else {
      state.fresh = error ? Fresh::kFailed : Fresh::kWritten;
      state.crc32c[slot] = piece.extent.crc32c;
      --pending_writes_;
    }
    --pending_extents_;
    changed_.notify_all();
  }
  piece.ticket->finish_piece(std::move(error));
}

void DurableStoreCore::verify() {
  ExtentIo io;
  const BlockMemory memory = allocate_blocks(extent_bytes());
  for (size_t i = 0; i < states_.size(); ++i) {
    Extent extent;
    size_t slot = 0;
    {
      const std::lock_guard lock(mutex_);
      check_open();
      if (states_[i].committed == kNoSlot) continue;
      slot = states_[i].committed;
      extent = extent_at(i, slot);
      ++states_[i].readers[slot];
    }
    std::exception_ptr error;
    try {
      const AnnotatedWork work(kDiskRead, extent.size_bytes);
      ExtentNotes notes;
      io.read(store_.folders[extent.folder]->file(), extent, memory.get(), notes);
    } catch (...) {
      error = named(std::current_exception(), layout().name_of(i));
    }
    {
      const std::lock_guard lock(mutex_);
      --states_[i].readers[slot];
    }
    if (error) std::rethrow_exception(error);
  }
}

bool DurableStoreCore::is_committed(size_t entry) const {
  const std::lock_guard lock(mutex_);
  const DurableLayout::ExtentRange range = layout().all_of(entry);
  for (size_t i = range.first; i < range.first + range.count; ++i) {
    if (states_[i].committed == kNoSlot) return false;
  }
  return true;
}

DurableExtra DurableStoreCore::extra() const {
  const std::lock_guard lock(mutex_);
  return {store_.manifest.extra_kind, store_.manifest.extra};
}

DurableStats DurableStoreCore::stats() const {
  DurableStats stats{};
  {
    const std::lock_guard lock(mutex_);
    stats.sequence = store_.record.sequence;
  }
  stats.written_bytes = write_limit_.written_bytes();
  stats.read_bytes = read_bytes_;
  stats.pending_extents = pending_extents_;
  stats.engine = engines_->kind();
  stats.engine_notes = engines_->notes();
  stats.notes = store_.notes;
  stats.waits = waits_->stats();
  stats.commits = commits_.stats();
  stats.is_direct = true;
  for (size_t i = 0; i < store_.folders.size(); ++i) {
    const DurableFolder& folder = *store_.folders[i];
    const uint64_t file_bytes = layout().file_bytes(i);
    const FolderCounters& counters = engines_->counters(i);
    stats.folders.push_back({folder.path(), folder.is_direct(), file_bytes,
                             counters.stats(TransferDirection::kWrite),
                             counters.stats(TransferDirection::kRead)});
    stats.is_direct = stats.is_direct && folder.is_direct();
    stats.file_bytes += file_bytes;
  }
  return stats;
}

}  // namespace spillover
