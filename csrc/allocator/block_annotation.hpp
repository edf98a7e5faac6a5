// Tells the checker of an emulated device which blocks a program has that it took from the pool
// itself. torch's are told by torch's own trackers; without the others, bytes that torch gave back
// and somebody else has now would pass for freed. Does nothing on a real driver, and nothing where
// the checker does not follow blocks.
//
// Thread-safe; must not be called with a lock of the pool's held.
#pragma once

#include <cstddef>

namespace spillover {

// After the pool has handed the block out.
void annotate_block_begin(const void* address, size_t size_bytes);

// Before the pool gets it back.
void annotate_block_end(const void* address);

}  // namespace spillover
