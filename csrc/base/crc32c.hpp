// CRC-32C (Castagnoli), as in iSCSI (RFC 3720) and ext4. Uses SSE4.2 where the CPU has it.
// Thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>

namespace spillover {

// Pass the previous result as seed to go on over several pieces.
uint32_t crc32c(const void* data, size_t size_bytes, uint32_t seed = 0);

}  // namespace spillover
