#include "tiers/extent_placement.hpp"

#include <algorithm>
#include <cerrno>
#include <exception>
#include <string>
#include <utility>

#include "base/bytes.hpp"
#include "base/error.hpp"

namespace spillover {

ExtentPlacement::ExtentPlacement(std::vector<ScratchFile*> files, size_t extent_bytes_max,
                                 uint64_t limit_bytes)
    : extent_bytes_max_(extent_bytes_max),
      limit_bytes_(limit_bytes == UINT64_MAX ? UINT64_MAX
                                             : round_down(limit_bytes, kDiskBlockBytes)),
      rates_(files.size()) {
  for (ScratchFile* file : files) folders_.push_back({file, {}});
}

std::vector<Extent> ExtentPlacement::allocate(size_t size_bytes) {
  std::vector<Extent> extents;
  extents.reserve(size_bytes / extent_bytes_max_ + 1);
  const std::lock_guard lock(mutex_);
  try {
    for (size_t left = size_bytes; left > 0;) {
      const size_t next = std::min(left, extent_bytes_max_);
      if (!place_whole(next, &extents)) place_parts(next, &extents);
      left -= next;
    }
  } catch (...) {
    release_locked(extents);
    throw;
  }
  return extents;
}

// False where every folder is full, which full_ then says of the last.
bool ExtentPlacement::place_whole(size_t size_bytes, std::vector<Extent>* extents) {
  const uint64_t stored_bytes = round_up(size_bytes, kDiskBlockBytes);
  for (const size_t index : rates_.order()) {
    std::optional<uint64_t> offset = folders_[index].space.take_hole(stored_bytes);
    if (!offset) offset = append(index, stored_bytes);
    if (!offset) continue;
    extents->push_back({index, *offset, size_bytes, 0});
    rates_.charge(index, size_bytes);
    return true;
  }
  return false;
}

void ExtentPlacement::place_parts(size_t size_bytes, std::vector<Extent>* extents) {
  const std::exception_ptr full = full_;
  size_t left_bytes = size_bytes;
  while (left_bytes > 0 && place_in_largest_hole(&left_bytes, extents)) {
  }
  if (left_bytes == 0) return;
  // What the limit leaves at the files' ends may be less than all of it.
  const size_t at_end = std::min<uint64_t>(left_bytes, room_bytes());
  if (at_end > 0 && place_whole(at_end, extents)) left_bytes -= at_end;
  if (left_bytes == 0) return;
  if (full) std::rethrow_exception(full);
  uint64_t used_bytes = 0;
  for (const Folder& folder : folders_) used_bytes += folder.space.used_bytes();
  throw DiskFullError("the limit of " + format_bytes(limit_bytes_) +
                          " on space is reached: " + format_bytes(left_bytes) +
                          " of the request have none, with " + format_bytes(used_bytes) +
                          " in use. Raise limit, or offload less to disk",
                      folders_.front().file->folder(), EDQUOT);
}

bool ExtentPlacement::place_in_largest_hole(size_t* left_bytes, std::vector<Extent>* extents) {
  const auto largest =
      std::max_element(folders_.begin(), folders_.end(), [](const Folder& a, const Folder& b) {
        return a.space.largest_hole() < b.space.largest_hole();
      });
  const auto part = largest->space.take_part(round_up(*left_bytes, kDiskBlockBytes));
  if (!part) return false;
  const size_t size_bytes = std::min<uint64_t>(*left_bytes, part->size_bytes);
  const auto index = static_cast<size_t>(largest - folders_.begin());
  extents->push_back({index, part->offset, size_bytes, 0});
  rates_.charge(index, size_bytes);
  *left_bytes -= size_bytes;
  return true;
}

// Nothing where the limit or the disk does not allow it.
std::optional<uint64_t> ExtentPlacement::append(size_t index, uint64_t stored_bytes) {
  full_ = nullptr;
  if (room_bytes() < stored_bytes) return std::nullopt;
  Folder& folder = folders_[index];
  const uint64_t offset = folder.space.append(stored_bytes);
  try {
    folder.file->reserve(folder.space.end(), reservable_end(index));
    return offset;
  } catch (const DiskFullError&) {
    full_ = std::current_exception();
    folder.space.release(offset, stored_bytes);
    return std::nullopt;
  } catch (...) {
    folder.space.release(offset, stored_bytes);
    throw;
  }
}

// What the limit leaves; the files' holes count as taken.
uint64_t ExtentPlacement::room_bytes() const {
  uint64_t file_bytes = 0;
  for (const Folder& folder : folders_) file_bytes += folder.space.end();
  return limit_bytes_ - std::min(limit_bytes_, file_bytes);
}

// How far the folder's file may be reserved, which is its end at least. The others keep what they
// have reserved ahead, unless it is needed here; ahead of need none takes more than its part of the
// room.
uint64_t ExtentPlacement::reservable_end(size_t index) {
  if (limit_bytes_ == UINT64_MAX) return UINT64_MAX;
  const uint64_t end = folders_[index].space.end();
  const auto others_bytes = [&] {
    uint64_t sum = 0;
    for (size_t i = 0; i < folders_.size(); ++i) {
      const Folder& other = folders_[i];
      if (i != index) sum += std::max(other.file->reserved_end(), other.space.end());
    }
    return sum;
  };
  if (others_bytes() + end > limit_bytes_) {
    for (size_t i = 0; i < folders_.size(); ++i) {
      if (i != index) folders_[i].file->give_back(folders_[i].space.end());
    }
  }
  const uint64_t left_bytes = limit_bytes_ - std::min(limit_bytes_, others_bytes() + end);
  return end + std::min(left_bytes, room_bytes() / (2 * folders_.size()));
}

void ExtentPlacement::release(const std::vector<Extent>& extents) noexcept {
  const std::lock_guard lock(mutex_);
  release_locked(extents);
}

void ExtentPlacement::release_failed(const std::vector<Extent>& extents) noexcept {
  const std::lock_guard lock(mutex_);
  release_locked(extents);
  for (Folder& folder : folders_) folder.file->give_back(folder.space.end());
}

void ExtentPlacement::release_locked(const std::vector<Extent>& extents) noexcept {
  for (const Extent& extent : extents) {
    folders_[extent.folder].space.release(extent.offset,
                                          round_up(extent.size_bytes, kDiskBlockBytes));
  }
}

std::vector<ExtentPlacement::FolderUse> ExtentPlacement::use() const {
  std::vector<FolderUse> found;
  found.reserve(folders_.size());
  const std::lock_guard lock(mutex_);
  for (const Folder& folder : folders_) {
    found.push_back({folder.space.used_bytes(), folder.space.end()});
  }
  return found;
}

}  // namespace spillover
