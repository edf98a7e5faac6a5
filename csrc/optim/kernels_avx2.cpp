// The kernels for x86 processors with AVX2, FMA and F16C.
#include "optim/kernel_table.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

#include "optim/kernel_includes.hpp"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace spillover {
namespace {

#include "optim/formats.inc"

struct Vector {
  static constexpr size_t kLanes = 8;
  typedef float F __attribute__((vector_size(32)));
  typedef int32_t I __attribute__((vector_size(32)));
  typedef uint32_t U __attribute__((vector_size(32)));
  typedef uint16_t U16 __attribute__((vector_size(16)));
  typedef uint8_t U8 __attribute__((vector_size(8)));
  typedef float HalfF __attribute__((vector_size(16)));
  typedef double D __attribute__((vector_size(32)));

  static F splat(float value) { return _mm256_set1_ps(value); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F sqrt(F a) { return _mm256_sqrt_ps(a); }
  static F lookup(const float* table, I index) {
    return _mm256_permutevar8x32_ps(_mm256_load_ps(table), cast<__m256i>(index));
  }
  // What is narrowed fits.
  static U widen(U16 value) { return cast<U>(_mm256_cvtepu16_epi32(cast<__m128i>(value))); }
  static U widen(U8 value) {
    return cast<U>(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(cast<long long>(value))));
  }
  static U16 narrow16(U value) {
    const __m256i packed = _mm256_packus_epi32(cast<__m256i>(value), cast<__m256i>(value));
    return cast<U16>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
  }
  static U8 narrow8(U value) {
    const __m128i words = cast<__m128i>(narrow16(value));
    return cast<U8>(static_cast<long long>(_mm_cvtsi128_si64(_mm_packus_epi16(words, words))));
  }
  static D to_double(HalfF value) { return _mm256_cvtps_pd(value); }
  static F from_half(U16 half) { return _mm256_cvtph_ps(cast<__m128i>(half)); }
  static U16 to_half(F value) {
    return cast<U16>(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static void stream(void* to, const void* from, size_t size_bytes) {
    for (size_t at = 0; at < size_bytes; at += sizeof(__m256i)) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(static_cast<char*>(to) + at),
                          load<__m256i>(static_cast<const char*>(from) + at));
    }
  }
  static void finish_streaming() { _mm_sfence(); }
};

#include "optim/kernels.inc"

}  // namespace

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const KernelTable* avx2_kernels() noexcept {
  static constexpr KernelTable kTable = table_named("avx2");
  return &kTable;
}

}  // namespace spillover

#else

namespace spillover {
const KernelTable* avx2_kernels() noexcept {
  return nullptr;
}
}  // namespace spillover

#endif
