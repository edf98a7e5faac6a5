// A block's memory as other processes can open it: values only.
//
// Note [Shared memory]: what a process shares are the chunks below a block, or where addresses are
// fixed the one chunk that the block lies in. Another process that opens them has every byte of
// them, those of neighbouring blocks too, as with torch's own allocator. Whoever shares a block
// keeps it live until every process has closed it; torch counts that. Until then nothing needs to
// be held on purpose: the chunks of a live block stay where they are. Afterwards a mapping that
// somebody has forgotten shows memory that other blocks may have, or that this process does not
// hold any more and the device does.
//
// Mapped chunks are shared by file descriptors of this process. A chunk's descriptor is made once,
// so that a block that is sent many times looks the same each time, and is closed when the chunk is
// unmapped, or by a later share() that finds no live block of those that were shared over it.
// A child of fork() has a copy of it, which keeps the memory for as long as the child lives.
//
// Memory of an upstream is shared by the handle of the driver's allocation that it is a part of.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "driver/interprocess_memory.hpp"

namespace spillover {

struct SharedChunk {
  size_t size_bytes = 0;
  int file = -1;
  // Tells memory from other memory that had this process and file number at another time; 0 where
  // the sharing process says nothing.
  uint64_t identity = 0;

  auto operator<=>(const SharedChunk&) const = default;
};

struct SharedBlock {
  size_t offset_bytes = 0;          // of the block in the memory below
  int process = 0;                  // whose files they are
  std::vector<SharedChunk> chunks;  // neighbours, in the order of addresses; or none and
  InterprocessHandle handle{};      // the handle of memory at a fixed address
};

}  // namespace spillover
