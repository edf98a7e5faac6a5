// CRC-32C (Castagnoli), as in iSCSI (RFC 3720) and ext4.
//
// With SSE4.2 three lanes of the data run through the crc32 instruction at once, which hides its
// latency, and are joined by tables (Gopal et al., "Fast CRC Computation for iSCSI Polynomial Using
// CRC32 Instruction", 2011); without, tables do it all. Thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>

namespace spillover {

// Pass the previous result as seed to go on over several pieces.
uint32_t crc32c(const void* data, size_t size_bytes, uint32_t seed = 0);

// The same without special instructions; for tests.
uint32_t crc32c_portable(const void* data, size_t size_bytes, uint32_t seed = 0);

// The sum of two pieces, one after the other, from the sum of each.
uint32_t join_crc32c(uint32_t first, uint32_t second, uint64_t second_size_bytes);

}  // namespace spillover
