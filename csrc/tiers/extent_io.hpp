// Moves one extent between host memory of any alignment and a file, with its checksum.
//
// An ExtentIo belongs to one I/O thread. Blocks. Memory that is not aligned to the disk's block,
// and the last part of a block, go through a bounce buffer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "tiers/block_file.hpp"
#include "tiers/extent_space.hpp"
#include "tiers/folder_counters.hpp"

namespace spillover {

struct Extent {
  size_t folder;      // Index of the store's folder.
  uint64_t offset;    // In that folder's file.
  size_t size_bytes;  // As stored by the user; the file holds it rounded up to a block.
  uint32_t crc32c;    // Of size_bytes; set by the write.
};

// How much of the memory, from its beginning on, can be given to the disk as it is.
size_t direct_bytes(const std::byte* data, size_t size_bytes);

// The checksum of an extent or of a part of it; the time that it takes is noted and traced.
uint32_t timed_crc32c(const std::byte* data, size_t size_bytes, ExtentNotes& notes);

// Throws CorruptDataError unless crc32c is the extent's.
void check_sum(const BlockFile& file, const Extent& extent, uint32_t crc32c);

struct FreeMemory {
  void operator()(std::byte* pointer) const noexcept;
};
using BlockMemory = std::unique_ptr<std::byte, FreeMemory>;

// Memory that can be given to the disk; throws std::bad_alloc.
BlockMemory allocate_blocks(size_t size_bytes);

class ExtentIo {
 public:
  ExtentIo();

  // Throws what BlockFile throws. Returns the checksum of data, which is only read from.
  uint32_t write(const BlockFile& file, const Extent& extent, std::byte* data, ExtentNotes& notes);

  // Throws what BlockFile throws, and CorruptDataError when the checksum differs; data then holds
  // the corrupt bytes.
  void read(const BlockFile& file, const Extent& extent, std::byte* data, ExtentNotes& notes);

 private:
  BlockMemory bounce_;
};

}  // namespace spillover
