// What the optimizer kernels work on: types of elements, formats of moments, and one contiguous
// range of a parameter with everything that a step reads and writes of it.
//
// Values only. Nothing here owns memory: the caller keeps every array alive, and lets nobody else
// touch it, until the kernel that it gave them to has returned.
//
// Note [Formats of moments]
// fp32 is exact. The others are rounded once a step:
// - bf16: to one of the two neighbours at random, the nearer one with the larger chance (stochastic
//   rounding), so that the mean is right: a second moment with beta2 = 0.999 changes by less than
//   half a unit in the last place a step, and would never move if it went to the nearest. The error
//   is below 2^-7 of the value. The chance is a hash of the element's index and the step, so the
//   same step always gives the same bits.
// - 8 bits blockwise (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022): 256
//   elements share a scale, their largest magnitude, and a code of decades tells what part of it a
//   value is: code c (7 bits and a sign, 8 bits where values have none) with the highest bit e
//   stands for the middle of a cell, of which there are 2^e of equal width in the decade from
//   10^(e-top-1) to 10^(e-top), top being 6 or 7. The highest code stands for the scale itself, 0
//   for zero. With m the block's largest magnitude, the error is at most, signed: 0.0071 m above
//   m/10 (0.0141 m beside m itself), 0.0015 m above m/100; unsigned: 0.0036 m (0.0071 m) and
//   0.00071 m. Unsigned values above zero are never stored as zero, for the sake of what is divided
//   by them; signed ones below 1e-7 m are. A block with a value that is not finite becomes NaN as a
//   whole, and one whose values are all below 2^-126 becomes zeros.
#pragma once

#include <cstddef>
#include <cstdint>

namespace spillover {

enum class ElementType { kFloat32, kBFloat16, kFloat16 };

constexpr size_t size_bytes_of(ElementType type) {
  return type == ElementType::kFloat32 ? 4 : 2;
}

enum class MomentFormat { kNone, kFloat32, kBFloat16, kBlockwise8 };

// Elements that share a scale. Ranges are cut at multiples of it, counted from where the range
// begins; ranges with 8-bit moments may be cut by callers only there.
inline constexpr size_t kBlockElements = 256;

constexpr size_t block_count(size_t count) {
  return (count + kBlockElements - 1) / kBlockElements;
}

struct Moment {
  MomentFormat format = MomentFormat::kNone;
  void* values = nullptr;
  float* scales = nullptr;  // block_count(count) of them, for kBlockwise8
};

// The fp32 value that is updated is either `weight`, or put together from `low_weight` (bf16) and
// `remainder`: weight bits = (low_weight << 16) + remainder, a signed number. Low weights are then
// the nearest bf16, ties away from zero, since a remainder has no bit for the other choice.
// Otherwise low weights are only written: the nearest value, ties to even, NaN kept.
struct UpdateRange {
  size_t count = 0;
  uint64_t first_index = 0;  // of the range in its parameter; Note [Formats of moments], bf16
  int64_t step = 1;          // the number of this step, from 1

  const void* gradient = nullptr;  // of any alignment
  ElementType gradient_type = ElementType::kFloat32;
  float* weight = nullptr;
  void* low_weight = nullptr;
  ElementType low_weight_type = ElementType::kBFloat16;
  int16_t* remainder = nullptr;

  Moment first;       // exp_avg, momentum_buffer
  Moment second;      // exp_avg_sq, sum
  Moment second_max;  // max_exp_avg_sq
};

}  // namespace spillover
