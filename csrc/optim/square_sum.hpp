// An exact sum of doubles that are not negative, so that sums of squares do not depend on the order
// in which threads and pieces of a gradient are added.
//
// Note [Exact sums]
// Squares of fp32 values are exact in double. 256 of them are added in a fixed order, and what
// comes out is a multiple of 2^-350 below 2^265: an integer of 20 digits of 32 bits. The digits are
// kept in 64 bits each, so carries are made once in 2^31 additions. Pieces that are cut at
// multiples of kBlockElements thus give the same sum, whichever they are and whoever adds them.
//
// Not thread-safe.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace spillover {

class SquareSum {
 public:
  // A sum of up to kBlockElements squares of fp32 values; it may be inf or NaN.
  void add(double block_sum) noexcept;
  void add(const SquareSum& other) noexcept;

  // The nearest double.
  double value() const noexcept;

 private:
  static constexpr size_t kDigits = 22;

  void carry() noexcept;

  std::array<uint64_t, kDigits> digits_{};
  uint32_t additions_ = 0;
  double special_ = 0;  // inf or NaN once one was added
};

}  // namespace spillover
