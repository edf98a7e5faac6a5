#include "tiers/disk_store_core.hpp"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <exception>
#include <string>
#include <utility>

#include "base/bytes.hpp"
#include "base/error.hpp"

namespace spillover {
namespace {

void check_options(const DiskStoreOptions& options) {
  if (options.folders.empty()) throw ConfigError("a disk store needs at least one folder");
  if (options.threads_per_folder < 1 || options.threads_per_folder > 64)
    throw ConfigError("threads_per_folder must be between 1 and 64");
  if (options.queue_length_max < 1) throw ConfigError("queue_length_max must be at least 1");
  if (options.extent_bytes_max < kDiskBlockBytes || options.extent_bytes_max % kDiskBlockBytes != 0)
    throw ConfigError("extent_bytes_max must be a multiple of " + std::to_string(kDiskBlockBytes));
}

}  // namespace

DiskStoreCore::DiskStoreCore(const DiskStoreOptions& options)
    : options_(options), owner_(getpid()) {
  check_options(options);
  for (const std::string& name : options.folders) {
    folders_.push_back(std::make_unique<Folder>(ScratchFile(name, options.preallocation),
                                                options.queue_length_max));
  }
  try {
    for (const auto& folder : folders_) {
      for (size_t i = 0; i < options.threads_per_folder; ++i) {
        folder->threads.emplace_back([this, raw = folder.get()] { serve(*raw); });
      }
    }
  } catch (...) {
    close();
    throw;
  }
}

DiskStoreCore::~DiskStoreCore() {
  close();
  // In a forked child the threads are not there; joining or ending them would stop the process.
  if (getpid() == owner_) return;
  for (auto& folder : folders_) static_cast<void>(folder.release());
}

void DiskStoreCore::close() noexcept {
  if (getpid() != owner_) return;
  const std::lock_guard lock(close_mutex_);
  is_closed_ = true;
  for (const auto& folder : folders_) folder->queue.close();
  for (const auto& folder : folders_) {
    for (std::thread& thread : folder->threads) thread.join();
    folder->threads.clear();
  }
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

std::vector<Extent> DiskStoreCore::allocate(size_t size_bytes) {
  std::vector<Extent> extents;
  extents.reserve(size_bytes / options_.extent_bytes_max + 1);
  try {
    for (size_t left = size_bytes; left > 0; left -= extents.back().size_bytes) {
      extents.push_back(allocate_extent(std::min(left, options_.extent_bytes_max)));
    }
  } catch (...) {
    release(extents);
    throw;
  }
  return extents;
}

// A folder without room is passed over as long as another one has some.
Extent DiskStoreCore::allocate_extent(size_t size_bytes) {
  const size_t stored_bytes = round_up(size_bytes, kDiskBlockBytes);
  const size_t first = next_folder_++;
  std::exception_ptr full;
  for (size_t i = 0; i < folders_.size(); ++i) {
    const size_t index = (first + i) % folders_.size();
    Folder& folder = *folders_[index];
    const std::lock_guard lock(folder.mutex);
    const uint64_t offset = folder.space.allocate(stored_bytes);
    try {
      folder.file.reserve(folder.space.end());
      return {index, offset, size_bytes, 0};
    } catch (const DiskFullError&) {
      folder.space.release(offset, stored_bytes);
      full = std::current_exception();
    } catch (...) {
      folder.space.release(offset, stored_bytes);
      throw;
    }
  }
  std::rethrow_exception(full);
}

void DiskStoreCore::release(const std::vector<Extent>& extents) noexcept {
  if (getpid() != owner_) return;
  for (const Extent& extent : extents) {
    Folder& folder = *folders_[extent.folder];
    const std::lock_guard lock(folder.mutex);
    folder.space.release(extent.offset, round_up(extent.size_bytes, kDiskBlockBytes));
  }
}

void DiskStoreCore::submit(Piece piece, size_t folder) noexcept {
  ++pending_extents_;
  piece.work = annotate_work_submit(piece.direction == Direction::kRead ? kDiskRead : kDiskWrite,
                                    piece.size_bytes);
  piece.ticket->add_work(piece.work);
  std::exception_ptr error;
  try {
    // A piece that is not taken is left as it was, also where this throws.
    if (folders_[folder]->queue.push(std::move(piece))) return;
    error = std::make_exception_ptr(StateError("the disk store was closed meanwhile"));
  } catch (...) {
    error = std::current_exception();
  }
  {
    const WorkScope nothing(piece.work);
  }
  finish(piece, std::move(error));
}

void DiskStoreCore::serve(Folder& folder) noexcept {
  pthread_setname_np(pthread_self(), "spillover-disk");
  ExtentIo io;
  while (auto piece = folder.queue.pop()) {
    std::exception_ptr error;
    try {
      run(folder, *piece, io);
    } catch (...) {
      error = std::current_exception();
    }
    finish(*piece, std::move(error));
  }
}

void DiskStoreCore::run(Folder& folder, Piece& piece, ExtentIo& io) {
  const WorkScope work(piece.work);
  Extent& extent = piece.payload->extents_[piece.extent];
  if (piece.direction == Direction::kRead) {
    io.read(folder.file, extent, piece.data);
    read_bytes_ += extent.size_bytes;
    return;
  }
  if (piece.gate) (*piece.gate)();
  extent.crc32c = io.write(folder.file, extent, piece.data);
}

// The payload is settled, and this thread's hold on it gone, before anybody who waits for the
// ticket can look.
void DiskStoreCore::finish(Piece& piece, std::exception_ptr error) noexcept {
  --pending_extents_;
  if (piece.direction == Direction::kWrite) {
    DiskPayload& payload = *piece.payload;
    if (error) payload.has_failed_ = true;
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
  DiskStats stats{written_bytes_, read_bytes_, 0, 0, pending_extents_, true};
  for (const auto& folder : folders_) {
    const std::lock_guard lock(folder->mutex);
    stats.used_bytes += folder->space.used_bytes();
    stats.file_bytes += folder->space.end();
    stats.is_direct = stats.is_direct && folder->file.is_direct();
  }
  return stats;
}

}  // namespace spillover
