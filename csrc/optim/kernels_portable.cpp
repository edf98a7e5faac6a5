// The kernels in standard C++ and the compilers' vectors of 16 bytes: for processors without what
// the others need, and the reference that tests compare those with.
#include "optim/kernel_includes.hpp"
#include "optim/kernel_table.hpp"

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
    F result = c;
    for (size_t i = 0; i < kLanes; ++i) result[i] = std::fma(a[i], b[i], c[i]);
    return result;
  }
  static F sqrt(F a) {
    for (size_t i = 0; i < kLanes; ++i) a[i] = std::sqrt(a[i]);
    return a;
  }
  static F lookup(const float* table, I index) {
    F result{};
    for (size_t i = 0; i < kLanes; ++i) result[i] = table[index[i] & 7];
    return result;
  }
  static U widen(U16 value) { return convert<U>(value); }
  static U widen(U8 value) { return convert<U>(value); }
  static U16 narrow16(U value) { return convert<U16>(value); }
  static U8 narrow8(U value) { return convert<U8>(value); }
  static D to_double(HalfF value) { return convert<D>(value); }
  static F from_half(U16 half) { return half_to_float<Vector>(half); }
  static U16 to_half(F value) { return float_to_half<Vector>(value); }
  static void stream(void* to, const void* from, size_t size_bytes) {
    std::memcpy(to, from, size_bytes);
  }
  static void finish_streaming() {}
};

#include "optim/kernels.inc"

}  // namespace

const KernelTable* portable_kernels() noexcept {
  static constexpr KernelTable kTable = table_named("portable");
  return &kTable;
}

}  // namespace spillover
