// Which folder, and which part of its file, each extent of a disk store gets.
//
// Note [Space]. An extent goes to the folder whose turn it is (Note [Striping]): into a hole of its
// file, else at its end, and to the next folder where that has no room. Where no folder takes it
// whole, because the disks or the store's limit are full up to what holes there are, it is split
// over them, down to single blocks: nothing fails for fragmentation while there is room enough. The
// limit holds for the files' sizes, and for what is reserved ahead of them.
//
// Thread-safe; the mutex is held over the system calls that reserve space.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <mutex>
#include <optional>
#include <vector>

#include "tiers/extent_io.hpp"
#include "tiers/extent_space.hpp"
#include "tiers/folder_rates.hpp"
#include "tiers/scratch_file.hpp"

namespace spillover {

class ExtentPlacement {
 public:
  struct FolderUse {
    uint64_t used_bytes;
    uint64_t file_bytes;
  };

  // The files outlive this.
  ExtentPlacement(std::vector<ScratchFile*> files, size_t extent_bytes_max, uint64_t limit_bytes);

  // Extents that hold size_bytes together. Throws DiskFullError, or StorageError; nothing is taken
  // then.
  std::vector<Extent> allocate(size_t size_bytes);
  void release(const std::vector<Extent>& extents) noexcept;
  // Those of a write that is over and failed. Gives back to the disk what lies behind all others:
  // of a full one the last extents may have got what the first ones lacked.
  void release_failed(const std::vector<Extent>& extents) noexcept;

  std::vector<FolderUse> use() const;
  FolderRates& rates() { return rates_; }
  const FolderRates& rates() const { return rates_; }

 private:
  struct Folder {
    ScratchFile* file;
    ExtentSpace space;
  };

  bool place_whole(size_t size_bytes, std::vector<Extent>* extents);
  void place_parts(size_t size_bytes, std::vector<Extent>* extents);
  bool place_in_largest_hole(size_t* left_bytes, std::vector<Extent>* extents);
  std::optional<uint64_t> append(size_t index, uint64_t stored_bytes);
  uint64_t reservable_end(size_t index);
  void release_locked(const std::vector<Extent>& extents) noexcept;
  uint64_t room_bytes() const;

  const size_t extent_bytes_max_;
  const uint64_t limit_bytes_;
  FolderRates rates_;

  mutable std::mutex mutex_;
  // Guarded by mutex_.
  std::vector<Folder> folders_;
  std::exception_ptr full_;  // What the last folder said that had no room.
};

}  // namespace spillover
