// The kernels for 64-bit Arm processors, all of which have NEON.
#include "optim/kernel_table.hpp"

#if defined(__aarch64__)
#include <arm_neon.h>

#include "optim/kernel_includes.hpp"

namespace spillover {
namespace {

#include "optim/formats.inc"

struct Vector {
  static constexpr size_t kLanes = 4;
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  typedef uint32_t U __attribute__((vector_size(16)));
  typedef uint16_t U16 __attribute__((vector_size(8)));
  typedef uint8_t U8 __attribute__((vector_size(4)));
  typedef float HalfF __attribute__((vector_size(8)));
  typedef double D __attribute__((vector_size(16)));

  static F splat(float value) { return F{value, value, value, value}; }
  static F fma(F a, F b, F c) {
    return cast<F>(vfmaq_f32(cast<float32x4_t>(c), cast<float32x4_t>(a), cast<float32x4_t>(b)));
  }
  static F sqrt(F a) { return cast<F>(vsqrtq_f32(cast<float32x4_t>(a))); }
  static F lookup(const float* table, I index) {
    F result{};
    for (size_t i = 0; i < kLanes; ++i) result[i] = table[index[i] & 7];
    return result;
  }
  static U widen(U16 value) { return cast<U>(vmovl_u16(cast<uint16x4_t>(value))); }
  static U widen(U8 value) { return convert<U>(value); }
  static U16 narrow16(U value) { return cast<U16>(vmovn_u32(cast<uint32x4_t>(value))); }
  static U8 narrow8(U value) { return convert<U8>(value); }
  static D to_double(HalfF value) { return convert<D>(value); }
  static F from_half(U16 half) { return cast<F>(vcvt_f32_f16(cast<float16x4_t>(half))); }
  static U16 to_half(F value) { return cast<U16>(vcvt_f16_f32(cast<float32x4_t>(value))); }
  static void stream(void* to, const void* from, size_t size_bytes) {
    // Pairs of registers past the caches; there are no intrinsics.
    for (size_t at = 0; at < size_bytes; at += 32) {
      const auto first = load<uint8x16_t>(static_cast<const char*>(from) + at);
      const auto second = load<uint8x16_t>(static_cast<const char*>(from) + at + 16);
      asm volatile("stnp %q0, %q1, [%2]"
                   :
                   : "w"(first), "w"(second), "r"(static_cast<char*>(to) + at)
                   : "memory");
    }
  }
  static void finish_streaming() {}
};

#include "optim/kernels.inc"

}  // namespace

const KernelTable* neon_kernels() noexcept {
  static constexpr KernelTable kTable = table_named("neon");
  return &kTable;
}

}  // namespace spillover

#else

namespace spillover {
const KernelTable* neon_kernels() noexcept {
  return nullptr;
}
}  // namespace spillover

#endif
