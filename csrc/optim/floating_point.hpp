// Standard arithmetic while it lives: rounding to nearest and denormals, whatever the thread's
// program has set (torch.set_flush_denormal does), so that results do not depend on who computes
// them. PRIVATE to optim/.
#pragma once

#include <cstdint>

namespace spillover {

class StandardArithmetic {
 public:
  StandardArithmetic() noexcept : before_(get()) {
    if (before_ != kStandard) set(kStandard);
  }
  ~StandardArithmetic() {
    if (before_ != kStandard) set(before_);
  }
  StandardArithmetic(const StandardArithmetic&) = delete;
  StandardArithmetic& operator=(const StandardArithmetic&) = delete;

 private:
#if defined(__x86_64__)
  static constexpr uint64_t kStandard = 0x1f80;  // All exceptions masked; the flags do not count.
  static uint64_t get() noexcept { return __builtin_ia32_stmxcsr() & ~0x3fU; }
  static void set(uint64_t state) noexcept { __builtin_ia32_ldmxcsr(static_cast<unsigned>(state)); }
#elif defined(__aarch64__)
  static constexpr uint64_t kStandard = 0;
  static uint64_t get() noexcept {
    uint64_t state = 0;
    asm volatile("mrs %0, fpcr" : "=r"(state));
    return state;
  }
  static void set(uint64_t state) noexcept { asm volatile("msr fpcr, %0" : : "r"(state)); }
#else
  static constexpr uint64_t kStandard = 0;
  static uint64_t get() noexcept { return 0; }
  static void set(uint64_t) noexcept {}
#endif

  const uint64_t before_;
};

}  // namespace spillover
