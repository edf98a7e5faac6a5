// Where a disk engine moves blocks to and from: an open file, and how its failures are told.
//
// A value that owns nothing: whoever opened the file keeps it open while engines work on it.
// Thread-safe. Offsets, sizes and addresses are multiples of kDiskBlockBytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "tiers/transfer_progress.hpp"

namespace spillover {

class BlockFile {
 public:
  // noun is what messages call it, such as "scratch file".
  BlockFile(int descriptor, std::string folder, const char* noun)
      : descriptor_(descriptor), folder_(std::move(folder)), noun_(noun) {}

  int descriptor() const { return descriptor_; }
  const std::string& folder() const { return folder_; }

  // "the scratch file in /nvme0/spill".
  std::string name() const { return std::string("the ") + noun_ + " in " + folder_; }

  // Blocks until all bytes are moved: short transfers are taken up again, and interrupted ones
  // repeated, which is counted in resubmits. Throws DiskFullError or StorageError with folder,
  // offset and errno, and CorruptDataError where the file ends early. data is only read from in a
  // write.
  void transfer(TransferDirection direction, std::byte* data, size_t size_bytes, uint64_t offset,
                uint32_t& resubmits) const;

  // For whoever makes transfers of this file another way: throws what transfer() would, of one that
  // began at offset and failed.
  [[noreturn]] void throw_failure(const TransferProgress& progress, uint64_t offset) const;

  // operation is a participle: "writing". Throws DiskFullError where the errno says so.
  [[noreturn]] void throw_error(const char* operation, uint64_t offset, size_t size_bytes,
                                int native_error) const;

 private:
  int descriptor_;
  std::string folder_;
  const char* noun_;
};

// "No space left on device (errno 28)".
std::string describe_errno(int native_error);

// The disk, or the user's share of it, has no room.
bool means_full(int native_error);

}  // namespace spillover
