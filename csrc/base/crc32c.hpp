// CRC-32C (Castagnoli), as in iSCSI (RFC 3720) and ext4.
//
// With AVX-512 and VPCLMULQDQ it is folded by carry-less products, about as fast as one core reads
// memory. With SSE4.2 three lanes of the data run through the crc32 instruction at once, which
// hides its latency, and are joined by tables (Gopal et al., "Fast CRC Computation for iSCSI
// Polynomial Using CRC32 Instruction", 2011); without, tables do it all. Thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace spillover {

// Pass the previous result as seed to go on over several pieces.
uint32_t crc32c(const void* data, size_t size_bytes, uint32_t seed = 0);

// The ways to compute it that this machine has, the one in use first; for tests.
struct Crc32cWay {
  const char* name;  // "products", "lanes" or "tables".
  uint32_t (*sum)(const void* data, size_t size_bytes, uint32_t seed);
};
std::vector<Crc32cWay> crc32c_ways();

// The sum of two pieces, one after the other, from the sum of each.
uint32_t join_crc32c(uint32_t first, uint32_t second, uint64_t second_size_bytes);

}  // namespace spillover
