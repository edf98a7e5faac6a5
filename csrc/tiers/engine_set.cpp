#include "tiers/engine_set.hpp"

#include <unistd.h>

#include <algorithm>
#include <iterator>
#include <utility>

#include "base/error.hpp"
#include "tiers/thread_engine.hpp"
#include "tiers/uring_engine.hpp"
#include "tiers/work_annotation.hpp"
#include "trace/recorder.hpp"

namespace spillover {
namespace {

std::exception_ptr closed_meanwhile() {
  return std::make_exception_ptr(StateError("the disk store was closed meanwhile"));
}

}  // namespace

void check_engine_options(const EngineOptions& options) {
  if (options.threads_per_folder < 1 || options.threads_per_folder > 64)
    throw ConfigError("threads_per_folder must be between 1 and 64");
  if (options.queue_length_max < 1) throw ConfigError("queue_length_max must be at least 1");
}

EngineSet::EngineSet(const std::vector<BlockFile>& files, DiskPieceOwner& owner,
                     const EngineOptions& options)
    : owner_(owner), options_(options), process_(getpid()) {
  for (const BlockFile& file : files) {
    counters_.push_back(std::make_unique<FolderCounters>(file.folder()));
  }
  gates_ = std::make_unique<WriteGates>(options.queue_length_max,
                                        [this](DiskPiece&& piece, std::exception_ptr error) {
                                          hand_over(std::move(piece), std::move(error));
                                        });
  try {
    make_engines(files);
  } catch (...) {
    close();
    throw;
  }
}

void EngineSet::make_engines(const std::vector<BlockFile>& files) {
  if (options_.kind == DiskEngineKind::kThreads) return make_thread_engines(files);
  try {
    make_uring_engines(files);
  } catch (const StorageError& error) {
    if (options_.kind == DiskEngineKind::kIoUring) throw;
    notes_ = error.what();
    for (const auto& engine : engines_) engine->close();
    engines_.clear();
    make_thread_engines(files);
  }
}

void EngineSet::make_uring_engines(const std::vector<BlockFile>& files) {
  for (const BlockFile& file : files) {
    auto engine = std::make_unique<UringEngine>(file, owner_, options_.queue_length_max);
    if (!engine->notes().empty()) notes_ = file.folder() + ": " + engine->notes();
    engines_.push_back(std::move(engine));
  }
  kind_ = DiskEngineKind::kIoUring;
}

void EngineSet::make_thread_engines(const std::vector<BlockFile>& files) {
  for (const BlockFile& file : files) {
    engines_.push_back(std::make_unique<ThreadEngine>(file, owner_, options_.threads_per_folder,
                                                      options_.queue_length_max));
  }
}

EngineSet::~EngineSet() {
  close();
  if (is_owned()) return;
  // Joining or ending threads that are not there would stop the process.
  for (auto& engine : engines_) static_cast<void>(engine.release());
  static_cast<void>(gates_.release());
}

bool EngineSet::is_owned() const {
  return getpid() == process_;
}

void EngineSet::close() noexcept {
  if (!is_owned()) return;
  const std::lock_guard lock(close_mutex_);
  // Writes at their gates go to the engines yet.
  gates_->close();
  for (const auto& engine : engines_) engine->close();
}

void EngineSet::submit(std::vector<DiskPiece> pieces, WriteGate gate) noexcept {
  const int64_t now_ns = trace_now_ns();
  for (DiskPiece& piece : pieces) {
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
void EngineSet::hand_over(DiskPiece&& piece, std::exception_ptr error) noexcept {
  // Where it cannot be handed over the folder seems busy for no time.
  owner_.start(piece);
  const int64_t submitted_ns = piece.notes.submitted_ns = trace_now_ns();
  const TransferDirection direction = piece.direction;
  const size_t folder = piece.extent.folder;
  FolderCounters& counters = *counters_[folder];
  counters.begin(direction, piece.notes);
  if (!error) {
    try {
      // A piece that is not taken is left as it was, also where this throws.
      if (engines_[folder]->submit(std::move(piece))) {
        counters.add_submitting(direction, trace_now_ns() - submitted_ns);
        return;
      }
      error = closed_meanwhile();
    } catch (...) {
      error = std::current_exception();
    }
  }
  owner_.finish(piece, std::move(error));
}

void EngineSet::note_end(const DiskPiece& piece, bool has_failed) noexcept {
  annotate_work_done(piece.work);
  counters_[piece.extent.folder]->end(piece.direction, piece.notes, piece.extent.size_bytes,
                                      has_failed);
}

size_t EngineSet::register_memory(std::byte* address, size_t size_bytes) {
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
    for (const auto& engine : engines_) {
      least_bytes = std::min(least_bytes, engine->register_memory(address, size_bytes));
    }
  } catch (...) {
    registered_memory_.erase(address);
    for (const auto& engine : engines_) engine->unregister_memory(address);
    throw;
  }
  return least_bytes;
}

void EngineSet::unregister_memory(std::byte* address) noexcept {
  if (!is_owned()) return;
  const std::lock_guard lock(memory_mutex_);
  if (registered_memory_.erase(address) == 0) return;
  for (const auto& engine : engines_) engine->unregister_memory(address);
}

}  // namespace spillover
