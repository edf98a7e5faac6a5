// To which sizes of blocks requests are rounded up, where a user wants more than kBlockAlignment.
//
// Between a power of two and the next one block sizes are so many *divisions* apart, a power of two
// itself; 0 or 1 leaves requests alone. That is torch's setting roundup_power2_divisions: requests
// of slightly different sizes then take equal blocks, for which fewer chunks are moved. Divisions
// are given for 16 powers of two, the first from 1 MiB on; what is smaller goes with the first,
// what is larger with the last.
//
// One value for every pool. Any thread may call both functions at any time; requests that are under
// way see the former or the new divisions.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <string>

#include "allocator/block.hpp"
#include "base/bytes.hpp"
#include "base/error.hpp"

namespace spillover {

class SizeRounding {
 public:
  static constexpr size_t kIntervalCount = 16;
  static constexpr size_t kFirstInterval = kMiB;
  static constexpr size_t kDivisionsMax = size_t{1} << 15U;

  // Throws ConfigError for divisions that are neither 0 nor a power of two up to kDivisionsMax.
  static void set(const std::array<size_t, kIntervalCount>& divisions) {
    uint64_t packed = 0;
    for (size_t i = 0; i < kIntervalCount; ++i) {
      if (divisions[i] == 0) continue;
      if (!std::has_single_bit(divisions[i]) || divisions[i] > kDivisionsMax) {
        throw ConfigError("sizes cannot be rounded to " + std::to_string(divisions[i]) +
                          " divisions of a power of two; write a power of two up to " +
                          std::to_string(kDivisionsMax) + ", or 0 for none");
      }
      packed |= uint64_t{static_cast<unsigned>(std::countr_zero(divisions[i]))} << (4 * i);
    }
    packed_.store(packed, std::memory_order_relaxed);
  }

  // The size of a block for a request, a multiple of kBlockAlignment. The size is not 0, and so far
  // from the largest that rounding it cannot overflow.
  static size_t round(size_t size_bytes) {
    const uint64_t packed = packed_.load(std::memory_order_relaxed);
    const size_t aligned_bytes = round_up(size_bytes, kBlockAlignment);
    if (packed == 0) [[likely]] {
      return aligned_bytes;
    }
    const size_t above = size_bytes / kFirstInterval;
    const size_t interval =
        above == 0 ? 0 : std::min<size_t>(std::bit_width(above) - 1, kIntervalCount - 1);
    const size_t shift = (packed >> (4 * interval)) & 0xFU;
    // So small that the divisions would be finer than the alignment.
    if (shift == 0 || size_bytes <= (kBlockAlignment << shift)) return aligned_bytes;
    return round_up(size_bytes, std::bit_floor(size_bytes) >> shift);
  }

 private:
  // The binary logarithms of the divisions, four bits each.
  static inline std::atomic<uint64_t> packed_{0};
};

}  // namespace spillover
