#include "base/crc32c.hpp"

#include <array>
#include <bit>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace spillover {
namespace {

// Slicing-by-8 tables (Kounavis and Berry, "A Systematic Approach to Building High Performance
// Software-based CRC Generators", 2005).
struct Tables {
  std::array<std::array<uint32_t, 256>, 8> t{};
  constexpr Tables() {
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t crc = i;
      for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? 0x82f63b78u : 0);
      t[0][i] = crc;
    }
    for (size_t slice = 1; slice < 8; ++slice)
      for (size_t i = 0; i < 256; ++i)
        t[slice][i] = (t[slice - 1][i] >> 8) ^ t[0][t[slice - 1][i] & 0xff];
  }
};
constexpr Tables kTables;

// Of polynomials modulo that of the sum, where a register's bit 31 is x to the power of 0.
constexpr uint32_t product(uint32_t a, uint32_t b) {
  uint32_t result = 0;
  for (; a != 0; a <<= 1) {
    result ^= b & (0u - (a >> 31));
    b = (b >> 1) ^ (0x82f63b78u & (0u - (b & 1)));
  }
  return result;
}

// What 1, 2, 4, 8 and so on zero bytes multiply a sum's register with: x to the power of their
// bits.
constexpr std::array<uint32_t, 64> byte_shifts() {
  std::array<uint32_t, 64> shifts{};
  uint32_t shift = uint32_t{1} << 23;
  for (uint32_t& one : shifts) {
    one = shift;
    shift = product(shift, shift);
  }
  return shifts;
}

uint32_t run_portable(const unsigned char* data, size_t size, uint32_t crc) {
  const auto& t = kTables.t;
  for (; size >= 8; data += 8, size -= 8) {
    uint32_t low = 0;
    uint32_t high = 0;
    std::memcpy(&low, data, 4);
    std::memcpy(&high, data + 4, 4);
    low ^= crc;
    crc = t[7][low & 0xff] ^ t[6][(low >> 8) & 0xff] ^ t[5][(low >> 16) & 0xff] ^ t[4][low >> 24] ^
          t[3][high & 0xff] ^ t[2][(high >> 8) & 0xff] ^ t[1][(high >> 16) & 0xff] ^
          t[0][high >> 24];
  }
  for (; size > 0; ++data, --size) crc = (crc >> 8) ^ t[0][(crc ^ *data) & 0xff];
  return crc;
}

#if defined(__x86_64__)

// What kBytes zero bytes do to a register, a table a byte of it.
template <size_t kBytes>
struct ShiftTables {
  static_assert(std::has_single_bit(kBytes));
  std::array<std::array<uint32_t, 256>, 4> t{};
  constexpr ShiftTables() {
    const uint32_t shift = byte_shifts()[std::countr_zero(kBytes)];
    for (size_t byte = 0; byte < 4; ++byte)
      for (uint32_t i = 0; i < 256; ++i) t[byte][i] = product(i << (8 * byte), shift);
  }
  uint32_t operator()(uint32_t crc) const {
    return t[0][crc & 0xff] ^ t[1][(crc >> 8) & 0xff] ^ t[2][(crc >> 16) & 0xff] ^ t[3][crc >> 24];
  }
};

__attribute__((target("sse4.2"))) inline uint64_t step(uint64_t crc, const unsigned char* data) {
  uint64_t word = 0;
  std::memcpy(&word, data, 8);
  return _mm_crc32_u64(crc, word);
}

// Runs three lanes of kBytes each as long as there are three.
template <size_t kBytes>
__attribute__((target("sse4.2"))) uint32_t run_lanes(const unsigned char*& data, size_t& size,
                                                     uint32_t crc) {
  static constexpr ShiftTables<kBytes> kShift;
  for (; size >= 3 * kBytes; data += 3 * kBytes, size -= 3 * kBytes) {
    uint64_t first = crc;
    uint64_t second = 0;
    uint64_t third = 0;
    for (size_t at = 0; at < kBytes; at += 8) {
      first = step(first, data + at);
      second = step(second, data + kBytes + at);
      third = step(third, data + 2 * kBytes + at);
    }
    crc = kShift(static_cast<uint32_t>(first)) ^ static_cast<uint32_t>(second);
    crc = kShift(crc) ^ static_cast<uint32_t>(third);
  }
  return crc;
}

__attribute__((target("sse4.2"))) uint32_t run_sse42(const unsigned char* data, size_t size,
                                                     uint32_t crc) {
  crc = run_lanes<4096>(data, size, crc);
  crc = run_lanes<256>(data, size, crc);
  uint64_t wide = crc;
  for (; size >= 8; data += 8, size -= 8) wide = step(wide, data);
  crc = static_cast<uint32_t>(wide);
  for (; size > 0; ++data, --size) crc = _mm_crc32_u8(crc, *data);
  return crc;
}

// x to the power of n modulo the polynomial; the register's bit 31 is x to the power of 0.
constexpr uint32_t power_of_x(size_t n) {
  uint32_t power = uint32_t{1} << 31;
  for (; n > 0; --n) power = (power >> 1) ^ ((power & 1) != 0 ? 0x82f63b78u : 0);
  return power;
}

// What is kFoldBytes further back is multiplied by x to the power of the distance, each half of 128
// bits by a factor of its own, and added to what is here: the sum stays the same (Gopal et al.,
// "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction", 2009). A factor of 32
// bits in a register of 64 counts for x^32 more, and a product of reflected numbers for x more. The
// half that comes first in memory is worth x^64 more than the other.
constexpr size_t kFoldBytes = 512;
constexpr long long kFirstFactor = power_of_x(8 * kFoldBytes + 64 - 33);
constexpr long long kSecondFactor = power_of_x(8 * kFoldBytes - 33);

#define SPILLOVER_WIDE __attribute__((target("sse4.2,avx512f,vpclmulqdq")))

SPILLOVER_WIDE inline __m512i fold(__m512i back, __m512i factors, __m512i here) {
  return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(back, factors, 0x00),
                                   _mm512_clmulepi64_epi128(back, factors, 0x11), here, 0x96);
}

// Eight registers of 64 bytes, which the memory cannot fill as fast as they are folded.
SPILLOVER_WIDE uint32_t run_wide(const unsigned char* data, size_t size, uint32_t crc) {
  constexpr size_t kLanes = kFoldBytes / sizeof(__m512i);
  if (size < 2 * kFoldBytes) return run_sse42(data, size, crc);
  const __m512i factors =
      _mm512_set4_epi64(kSecondFactor, kFirstFactor, kSecondFactor, kFirstFactor);
  __m512i lanes[kLanes];
  for (size_t i = 0; i < kLanes; ++i) lanes[i] = _mm512_loadu_si512(data + i * sizeof(__m512i));
  lanes[0] =
      _mm512_xor_si512(lanes[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(crc))));
  for (data += kFoldBytes, size -= kFoldBytes; size >= kFoldBytes;
       data += kFoldBytes, size -= kFoldBytes) {
#pragma GCC unroll 8
    for (size_t i = 0; i < kLanes; ++i) {
      lanes[i] = fold(lanes[i], factors, _mm512_loadu_si512(data + i * sizeof(__m512i)));
    }
  }
  alignas(64) unsigned char rest[kFoldBytes];
  for (size_t i = 0; i < kLanes; ++i) _mm512_store_si512(rest + i * sizeof(__m512i), lanes[i]);
  return run_sse42(data, size, run_sse42(rest, kFoldBytes, 0));
}

#undef SPILLOVER_WIDE

#endif

using Run = uint32_t (*)(const unsigned char* data, size_t size, uint32_t crc);

template <Run kRun>
uint32_t sum_by(const void* data, size_t size_bytes, uint32_t seed) {
  return ~kRun(static_cast<const unsigned char*>(data), size_bytes, ~seed);
}

}  // namespace

std::vector<Crc32cWay> crc32c_ways() {
  std::vector<Crc32cWay> ways;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("sse4.2")) {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq")) {
      ways.push_back({"products", sum_by<run_wide>});
    }
    ways.push_back({"lanes", sum_by<run_sse42>});
  }
#endif
  ways.push_back({"tables", sum_by<run_portable>});
  return ways;
}

uint32_t crc32c(const void* data, size_t size_bytes, uint32_t seed) {
  static const auto sum = crc32c_ways().front().sum;
  return sum(data, size_bytes, seed);
}

uint32_t join_crc32c(uint32_t first, uint32_t second, uint64_t second_size_bytes) {
  static constexpr std::array<uint32_t, 64> kShifts = byte_shifts();
  for (size_t bit = 0; second_size_bytes != 0; ++bit, second_size_bytes >>= 1)
    if ((second_size_bytes & 1) != 0) first = product(first, kShifts[bit]);
  return first ^ second;
}

}  // namespace spillover
