#include "optim/square_sum.hpp"

#include <bit>
#include <cmath>

namespace spillover {
namespace {

__extension__ typedef unsigned __int128 Wide;

constexpr int kUnitExponent = -350;
constexpr int kDigitBits = 32;
constexpr uint64_t kDigitMask = 0xffffffffU;

}  // namespace

void SquareSum::add(double block_sum) noexcept {
  const auto bits = std::bit_cast<uint64_t>(block_sum);
  const auto exponent = static_cast<int>(bits >> 52 & 0x7ff);
  if (exponent == 0) return;  // No sum of squares of fp32 values is this small, but zero.
  if (exponent == 0x7ff) {
    special_ += block_sum;
    return;
  }
  const uint64_t fraction = (bits & ((uint64_t{1} << 52) - 1)) | uint64_t{1} << 52;
  const auto shift = static_cast<unsigned>(exponent - 1075 - kUnitExponent);
  const size_t digit = shift / kDigitBits;
  const unsigned rest = shift % kDigitBits;
  const uint64_t low = fraction << rest;
  const uint64_t high = rest == 0 ? 0 : fraction >> (64 - rest);
  digits_[digit] += low & kDigitMask;
  digits_[digit + 1] += low >> kDigitBits;
  digits_[digit + 2] += high;
  if (++additions_ >> 31 != 0) carry();
}

void SquareSum::add(const SquareSum& other) noexcept {
  SquareSum carried = other;
  carried.carry();
  carry();
  for (size_t i = 0; i < kDigits; ++i) digits_[i] += carried.digits_[i];
  ++additions_;
  special_ += other.special_;
}

void SquareSum::carry() noexcept {
  uint64_t over = 0;
  for (uint64_t& digit : digits_) {
    digit += over;
    over = digit >> kDigitBits;
    digit &= kDigitMask;
  }
  additions_ = 0;
}

double SquareSum::value() const noexcept {
  if (special_ != 0) return special_;
  SquareSum carried = *this;
  carried.carry();
  const auto& digits = carried.digits_;
  size_t top = kDigits;
  while (top > 0 && digits[top - 1] == 0) --top;
  if (top == 0) return 0;
  // The highest 64 to 96 bits, and a bit that tells whether there are any below.
  Wide highest = 0;
  const size_t lowest = top < 3 ? 0 : top - 3;
  for (size_t i = top; i-- > lowest;) highest = highest << kDigitBits | digits[i];
  for (size_t i = 0; i < lowest; ++i)
    if (digits[i] != 0) highest |= 1;
  return std::ldexp(static_cast<double>(highest),
                    kUnitExponent + kDigitBits * static_cast<int>(lowest));
}

}  // namespace spillover
