#include "tiers/disk_store_core.hpp"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <exception>
#include <iterator>
#include <string>
#include <utility>

#include "base/bytes.hpp"
#include "base/error.hpp"
#include "tiers/thread_engine.hpp"
#include "tiers/uring_engine.hpp"
#include "trace/recorder.hpp"

namespace spillover {
namespace {

void check_options(const DiskStoreOptions& options) {
  if (options.folders.empty()) throw ConfigError("a disk store needs at least one folder");
  if (options.threads_per_folder < 1 || options.threads_per_folder > 64)
    throw ConfigError("threads_per_folder must be between 1 and 64");
  if (options.queue_length_max < 1) throw ConfigError("queue_length_max must be at least 1");
  if (options.extent_bytes_max < kDiskBlockBytes || options.extent_bytes_max % kDiskBlockBytes != 0)
    throw ConfigError("extent_bytes_max must be a multiple of " + std::to_string(kDiskBlockBytes));
  if (options.limit_bytes < kDiskBlockBytes)
    throw ConfigError("limit must be at least " + std::to_string(kDiskBlockBytes) + " bytes");
}

std::exception_ptr closed_meanwhile() {
  return std::make_exception_ptr(StateError("the disk store was closed meanwhile"));
}

}  // namespace

DiskStoreCore::DiskStoreCore(const DiskStoreOptions& options)
    : options_(options), owner_(getpid()) {
  check_options(options);
  for (const std::string& name : options.folders) {
    folders_.push_back(std::make_unique<Folder>(ScratchFile(name, options.preallocation)));
  }
  std::vector<ScratchFile*> files;
  for (const auto& folder : folders_) files.push_back(&folder->file);
  placement_ = std::make_unique<ExtentPlacement>(std::move(files), options.extent_bytes_max,
                                                 options.limit_bytes);
  gates_ = std::make_unique<WriteGates>(options.queue_length_max,
                                        [this](DiskPiece&& piece, std::exception_ptr error) {
                                          hand_over(std::move(piece), std::move(error));
                                        });
  try {
    make_engines();
  } catch (...) {
    close();
    throw;
  }
}

void DiskStoreCore::make_engines() {
  if (options_.engine == DiskEngineKind::kThreads) return make_thread_engines();
  try {
    make_uring_engines();
  } catch (const StorageError& error) {
    if (options_.engine == DiskEngineKind::kIoUring) throw;
    engine_notes_ = error.what();
    make_thread_engines();
  }
}

void DiskStoreCore::make_uring_engines() {
  for (const auto& folder : folders_) {
    auto engine = std::make_unique<UringEngine>(folder->file, *this, options_.queue_length_max);
    if (!engine->notes().empty()) engine_notes_ = folder->file.folder() + ": " + engine->notes();
    folder->engine = std::move(engine);
  }
  engine_ = DiskEngineKind::kIoUring;
}

void DiskStoreCore::make_thread_engines() {
  for (const auto& folder : folders_) {
    folder->engine = std::make_unique<ThreadEngine>(
        folder->file, *this, options_.threads_per_folder, options_.queue_length_max);
  }
}

DiskStoreCore::~DiskStoreCore() {
  close();
  // In a forked child the threads are not there; joining or ending them would stop the process.
  if (getpid() == owner_) return;
  for (auto& folder : folders_) static_cast<void>(folder.release());
  static_cast<void>(gates_.release());
}

void DiskStoreCore::close() noexcept {
  if (getpid() != owner_) return;
  const std::lock_guard lock(close_mutex_);
  is_closed_ = true;
  // Writes at their gates go to the engines yet.
  gates_->close();
  for (const auto& folder : folders_) {
    if (folder->engine != nullptr) folder->engine->close();
  }
}

size_t DiskStoreCore::register_memory(std::byte* address, size_t size_bytes) {
  const std::lock_guard lock(memory_mutex_);
  const auto next = registered_memory_.lower_bound(address);
  const bool runs_into_next =
      next != registered_memory_.end() && next->first < address + size_bytes;
  const bool is_in_before = next != registered_memory_.begin() &&
                            std::prev(next)->first + std::prev(next)->second > address;
  if (runs_into_next || is_in_before) {
    throw ConfigError(
        "a part of this memory is registered already; remove that registration first");
  }
  registered_memory_.emplace(address, size_bytes);
  size_t least_bytes = size_bytes;
  try {
    for (const auto& folder : folders_) {
      least_bytes = std::min(least_bytes, folder->engine->register_memory(address, size_bytes));
    }
  } catch (...) {
    registered_memory_.erase(address);
    for (const auto& folder : folders_) folder->engine->unregister_memory(address);
    throw;
  }
  return least_bytes;
}

void DiskStoreCore::unregister_memory(std::byte* address) noexcept {
  if (getpid() != owner_) return;
  const std::lock_guard lock(memory_mutex_);
  if (registered_memory_.erase(address) == 0) return;
  for (const auto& folder : folders_) folder->engine->unregister_memory(address);
}

void DiskStoreCore::check_open() const {
  if (is_closed_) throw StateError("the disk store is closed");
  if (getpid() != owner_) {
    throw StateError("a disk store cannot be used in a forked child; make one there");
  }
}

void DiskStoreCore::account_write(size_t size_bytes) {
  uint64_t before = written_bytes_.load();
  do {
    if (options_.write_limit_bytes - std::min(before, options_.write_limit_bytes) < size_bytes) {
      throw DiskFullError("the write limit of " + format_bytes(options_.write_limit_bytes) +
                              " is reached: " + format_bytes(before) + " are written and " +
                              format_bytes(size_bytes) +
                              " more were requested. Raise write_limit, or offload less to disk",
                          options_.folders.front(), EDQUOT);
    }
  } while (!written_bytes_.compare_exchange_weak(before, before + size_bytes));
}

void DiskStoreCore::release(const std::vector<Extent>& extents) noexcept {
  if (getpid() == owner_) placement_->release(extents);
}

void DiskStoreCore::submit(std::vector<DiskPiece> pieces, WriteGate gate) noexcept {
  const int64_t now_ns = trace_now_ns();
  for (DiskPiece& piece : pieces) {
    ++pending_extents_;
    piece.notes.requested_ns = now_ns;
    piece.notes.flow_id = trace_flow();
    piece.work =
        annotate_work_submit(piece.direction == TransferDirection::kRead ? kDiskRead : kDiskWrite,
                             piece.extent.size_bytes);
    piece.ticket->add_work(piece.work);
  }
  std::exception_ptr error;
  if (gate) {
    WriteGates::Write write{std::move(gate), std::move(pieces)};
    try {
      if (gates_->add(std::move(write))) return;
      error = closed_meanwhile();
    } catch (...) {
      error = std::current_exception();
    }
    pieces = std::move(write.pieces);
  }
  for (DiskPiece& piece : pieces) hand_over(std::move(piece), error);
}

// To the engine, unless there is an error already.
void DiskStoreCore::hand_over(DiskPiece&& piece, std::exception_ptr error) noexcept {
  // Where it cannot be handed over the folder seems busy for no time.
  placement_->rates().begin(piece.extent.folder, FolderRates::Clock::now());
  const int64_t submitted_ns = piece.notes.submitted_ns = trace_now_ns();
  const TransferDirection direction = piece.direction;
  Folder& folder = *folders_[piece.extent.folder];
  folder.counters.begin(direction, piece.notes);
  if (!error) {
    try {
      // A piece that is not taken is left as it was, also where this throws.
      if (folder.engine->submit(std::move(piece))) {
        folder.counters.add_submitting(direction, trace_now_ns() - submitted_ns);
        return;
      }
      error = closed_meanwhile();
    } catch (...) {
      error = std::current_exception();
    }
  }
  finish(piece, std::move(error));
}

// The payload is settled, and this thread's hold on it gone, before anybody who waits for the
// ticket can look.
void DiskStoreCore::finish(DiskPiece& piece, std::exception_ptr error) noexcept {
  annotate_work_done(piece.work);
  placement_->rates().end(piece.extent.folder, error ? 0 : piece.extent.size_bytes,
                          FolderRates::Clock::now());
  folders_[piece.extent.folder]->counters.end(piece.direction, piece.notes, piece.extent.size_bytes,
                                              error != nullptr);
  --pending_extents_;
  if (piece.direction == TransferDirection::kRead) {
    if (!error) read_bytes_ += piece.extent.size_bytes;
  } else {
    DiskPayload& payload = *piece.payload;
    if (error) payload.has_failed_ = true;
    payload.extents_[piece.index].crc32c = piece.extent.crc32c;
    if (payload.extents_left_.fetch_sub(1) == 1) {
      const bool failed = payload.has_failed_;
      if (failed) {
        release(payload.extents_);
        payload.extents_.clear();
      }
      payload.state_ = failed ? DiskPayload::State::kFailed : DiskPayload::State::kStored;
    }
  }
  piece.payload.reset();
  piece.ticket->finish_piece(std::move(error));
}

DiskStats DiskStoreCore::stats() const {
  DiskStats stats{written_bytes_, read_bytes_,   0, 0, pending_extents_, true,
                  engine_,        engine_notes_, {}};
  stats.waits = waits_->stats();
  const std::vector<ExtentPlacement::FolderUse> use = placement_->use();
  const std::vector<double> bandwidths = placement_->rates().bandwidths();
  for (size_t i = 0; i < folders_.size(); ++i) {
    const ScratchFile& file = folders_[i]->file;
    stats.used_bytes += use[i].used_bytes;
    stats.file_bytes += use[i].file_bytes;
    stats.is_direct = stats.is_direct && file.is_direct();
    const FolderCounters& counters = folders_[i]->counters;
    stats.folders.push_back({file.folder(), file.is_direct(), use[i].used_bytes, use[i].file_bytes,
                             bandwidths[i], counters.stats(TransferDirection::kWrite),
                             counters.stats(TransferDirection::kRead)});
  }
  return stats;
}

}  // namespace spillover
