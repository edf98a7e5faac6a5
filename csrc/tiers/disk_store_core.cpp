#include "tiers/disk_store_core.hpp"

#include <unistd.h>

#include <algorithm>
#include <exception>
#include <string>
#include <utility>

#include "base/bytes.hpp"
#include "base/error.hpp"

namespace spillover {
namespace {

EngineOptions engine_options(const DiskStoreOptions& options) {
  return {options.engine, options.threads_per_folder, options.queue_length_max};
}

void check_options(const DiskStoreOptions& options) {
  if (options.folders.empty()) throw ConfigError("a disk store needs at least one folder");
  check_engine_options(engine_options(options));
  if (options.extent_bytes_max < kDiskBlockBytes || options.extent_bytes_max % kDiskBlockBytes != 0)
    throw ConfigError("extent_bytes_max must be a multiple of " + std::to_string(kDiskBlockBytes));
  if (options.limit_bytes < kDiskBlockBytes)
    throw ConfigError("limit must be at least " + std::to_string(kDiskBlockBytes) + " bytes");
}

}  // namespace

DiskStoreCore::DiskStoreCore(const DiskStoreOptions& options)
    : options_(options), owner_(getpid()), write_limit_(options.write_limit_bytes) {
  check_options(options);
  for (const std::string& name : options.folders) {
    files_.push_back(std::make_unique<ScratchFile>(name, options.preallocation));
  }
  std::vector<ScratchFile*> files;
  for (const auto& file : files_) files.push_back(file.get());
  placement_ = std::make_unique<ExtentPlacement>(std::move(files), options.extent_bytes_max,
                                                 options.limit_bytes);
  engines_ = std::make_unique<EngineSet>(block_files(), *this, engine_options(options));
}

std::vector<BlockFile> DiskStoreCore::block_files() const {
  std::vector<BlockFile> files;
  for (const auto& file : files_) {
    files.push_back(file->blocks());
  }
  return files;
}

DiskStoreCore::~DiskStoreCore() {
  close();
}

void DiskStoreCore::close() noexcept {
  if (getpid() != owner_) return;
  is_closed_ = true;
  engines_->close();
}

void DiskStoreCore::check_open() const {
  if (is_closed_) throw StateError("the disk store is closed");
  if (getpid() != owner_) {
    throw StateError("a disk store cannot be used in a forked child; make one there");
  }
}

void DiskStoreCore::account_write(size_t size_bytes) {
  write_limit_.add(size_bytes, options_.folders.front());
}

void DiskStoreCore::release(const std::vector<Extent>& extents) noexcept {
  if (getpid() == owner_) placement_->release(extents);
}

void DiskStoreCore::submit(std::vector<DiskPiece> pieces, WriteGate gate) noexcept {
  pending_extents_ += pieces.size();
  engines_->submit(std::move(pieces), std::move(gate));
}

void DiskStoreCore::start(const DiskPiece& piece) noexcept {
  placement_->rates().begin(piece.extent.folder, FolderRates::Clock::now());
}

// The payload is settled, and this thread's hold on it gone, before anybody who waits for the
// ticket can look.
void DiskStoreCore::finish(DiskPiece& piece, std::exception_ptr error) noexcept {
  placement_->rates().end(piece.extent.folder, error ? 0 : piece.extent.size_bytes,
                          FolderRates::Clock::now());
  engines_->note_end(piece, error != nullptr);
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
        if (getpid() == owner_) placement_->release_failed(payload.extents_);
        payload.extents_.clear();
      }
      payload.state_ = failed ? DiskPayload::State::kFailed : DiskPayload::State::kStored;
    }
  }
  piece.payload.reset();
  piece.ticket->finish_piece(std::move(error));
}

DiskStats DiskStoreCore::stats() const {
  DiskStats stats{write_limit_.written_bytes(),
                  read_bytes_,
                  0,
                  0,
                  pending_extents_,
                  true,
                  engines_->kind(),
                  engines_->notes(),
                  {}};
  stats.waits = waits_->stats();
  const std::vector<ExtentPlacement::FolderUse> use = placement_->use();
  const std::vector<double> bandwidths = placement_->rates().bandwidths();
  for (size_t i = 0; i < files_.size(); ++i) {
    const ScratchFile& file = *files_[i];
    stats.used_bytes += use[i].used_bytes;
    stats.file_bytes += use[i].file_bytes;
    stats.is_direct = stats.is_direct && file.is_direct();
    const FolderCounters& counters = engines_->counters(i);
    stats.folders.push_back({file.folder(), file.is_direct(), use[i].used_bytes, use[i].file_bytes,
                             bandwidths[i], counters.stats(TransferDirection::kWrite),
                             counters.stats(TransferDirection::kRead)});
  }
  return stats;
}

}  // namespace spillover
