// The kernels for x86 processors with AVX-512 (F, BW, DQ and VL).
#include "optim/kernel_table.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

#include "optim/kernel_includes.hpp"

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

namespace spillover {
namespace {

#include "optim/formats.inc"

struct Vector {
  static constexpr size_t kLanes = 16;
  typedef float F __attribute__((vector_size(64)));
  typedef int32_t I __attribute__((vector_size(64)));
  typedef uint32_t U __attribute__((vector_size(64)));
  typedef uint16_t U16 __attribute__((vector_size(32)));
  typedef uint8_t U8 __attribute__((vector_size(16)));
  typedef float HalfF __attribute__((vector_size(32)));
  typedef double D __attribute__((vector_size(64)));

  // The forms without a mask warn of an uninitialised variable in the compiler's own header.
  static constexpr __mmask16 kAll = 0xffff;

  static F splat(float value) { return _mm512_set1_ps(value); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F sqrt(F a) { return _mm512_maskz_sqrt_ps(kAll, a); }
  static F lookup(const float* table, I index) {
    return _mm512_maskz_permutexvar_ps(kAll, cast<__m512i>(index), _mm512_load_ps(table));
  }
  static U widen(U16 value) {
    return cast<U>(_mm512_maskz_cvtepu16_epi32(kAll, cast<__m256i>(value)));
  }
  static U widen(U8 value) {
    return cast<U>(_mm512_maskz_cvtepu8_epi32(kAll, cast<__m128i>(value)));
  }
  // What is narrowed fits. The instructions' forms that write to memory are slow on some
  // processors, so the compiler must not use them.
  static U16 narrow16(U value) {
    __m256i result = _mm512_maskz_cvtepi32_epi16(kAll, cast<__m512i>(value));
    asm("" : "+v"(result));
    return cast<U16>(result);
  }
  static U8 narrow8(U value) {
    __m128i result = _mm512_maskz_cvtepi32_epi8(kAll, cast<__m512i>(value));
    asm("" : "+v"(result));
    return cast<U8>(result);
  }
  static D to_double(HalfF value) { return _mm512_maskz_cvtps_pd(0xff, value); }
  static F from_half(U16 half) { return _mm512_maskz_cvtph_ps(kAll, cast<__m256i>(half)); }
  static U16 to_half(F value) {
    return cast<U16>(
        _mm512_maskz_cvtps_ph(kAll, value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static void stream(void* to, const void* from, size_t size_bytes) {
    for (size_t at = 0; at < size_bytes; at += sizeof(__m512i)) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(static_cast<char*>(to) + at),
                          load<__m512i>(static_cast<const char*>(from) + at));
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

const KernelTable* avx512_kernels() noexcept {
  static constexpr KernelTable kTable = table_named("avx512");
  return &kTable;
}

}  // namespace spillover

#else

namespace spillover {
const KernelTable* avx512_kernels() noexcept {
  return nullptr;
}
}  // namespace spillover

#endif
