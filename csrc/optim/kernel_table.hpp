// The kernels of one instruction set, as functions. PRIVATE to optim/.
//
// Each kernels_*.cpp includes kernels.inc, the one text of all of them, over its own vectors and
// fills in a table. Kernels check nothing, allocate nothing and throw nothing. Any thread may run
// them, on parts that begin at multiples of kBlockElements.
#pragma once

#include <cstddef>
#include <cstdint>

#include "optim/conversions.hpp"
#include "optim/elements.hpp"
#include "optim/square_sum.hpp"

namespace spillover {

enum class Algorithm { kAdam, kSgd, kLion, kAdagrad };

// A running mean as torch computes it: from the end that is nearer, so that weight 1 gives the new
// value and weight 0 the old one.
struct Lerp {
  float coefficient = 0;
  bool starts_from_new = false;
};

// A factor near 1 as a sum of two: rounded to fp32 alone its error would grow with the steps. Both
// have one sign and none is zero, since an infinite value times such a part would become a NaN.
struct Split {
  float high = 1;
  float low = 0;
};

// What is the same for all elements of a range, computed in double.
struct StepConstants {
  Algorithm algorithm = Algorithm::kAdam;
  float gradient_scale = 1;  // negative to maximise
  float l2 = 0;              // gradient += l2 * weight
  bool decays = false;       // weight *= keep, in one rounding with the step
  Split keep;
  float step_size = 0;  // weight -= step_size * direction
  float eps = 0;

  Lerp first;         // Adam's exp_avg, Lion's direction
  Lerp second_lerp;   // Lion's exp_avg
  Split second_keep;  // Adam's beta2
  float second_weight = 0;
  float denominator_scale = 1;  // 1 / sqrt(1 - beta2^step)
  bool amsgrad = false;

  float momentum = 0;  // SGD's
  float undampened = 1;
  bool has_momentum = false;
  bool reads_momentum = false;  // not at the first step
  bool nesterov = false;

  uint32_t noise_seed = 0;
};

// Whether what is only written is put past the caches.
enum class Stores { kCached, kStreaming };

struct KernelTable {
  const char* name;
  void (*update)(const UpdateRange& range, const StepConstants& constants, size_t begin, size_t end,
                 Stores stores);
  // Adds to sum. Without a gradient, what is in the accumulator is only summed.
  void (*accumulate)(float* accumulator, const void* gradient, ElementType type, float scale,
                     bool adds, size_t count, SquareSum& sum);
  void (*sum_of_squares)(const void* address, ElementType type, size_t count, SquareSum& sum);
  void (*scale)(void* address, ElementType type, float factor, size_t count);
  // Counts; first gets the index of the first one.
  size_t (*count_non_finite)(const void* address, ElementType type, size_t count, size_t& first);

  // conversions.hpp
  void (*decode_blocks)(const uint8_t* codes, const float* scales, Signs signs, size_t count,
                        float* to);
  void (*encode_blocks)(const float* from, Signs signs, size_t count, uint8_t* codes,
                        float* scales);
  void (*join_weights)(const uint16_t* low, const int16_t* remainder, size_t count, float* to);
  void (*split_weights)(const float* from, size_t count, uint16_t* low, int16_t* remainder);
};

// nullptr where they are not built for this kind of processor.
const KernelTable* portable_kernels() noexcept;
const KernelTable* avx2_kernels() noexcept;
const KernelTable* avx512_kernels() noexcept;
const KernelTable* neon_kernels() noexcept;

}  // namespace spillover
