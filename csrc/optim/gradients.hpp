// What is done to gradients on the host between the device and the step: accumulation in fp32, sums
// of squares for clipping by the global norm, scaling, and the search for values that are not
// finite.
//
// Thread-safe where concurrent calls share no memory. The calls block, work on the shared threads
// (thread_pool.hpp) and throw ConfigError before anything was changed. Arrays have any alignment,
// but accumulators, which have that of a float.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "optim/elements.hpp"
#include "optim/square_sum.hpp"

namespace spillover {

struct ElementArray {
  const void* address = nullptr;
  ElementType type = ElementType::kFloat32;
  size_t count = 0;
};

struct Accumulation {
  float* accumulator = nullptr;
  ElementArray gradient;
};

enum class AccumulateMode { kOverwrite, kAdd };

// accumulator = scale * gradient, or += (fused), and what is in all accumulators then is squared
// and summed (Note [Exact sums]). threads: as in CallOptions.
SquareSum accumulate(std::span<const Accumulation> pieces, double scale, AccumulateMode mode,
                     int threads);

SquareSum sum_of_squares(std::span<const ElementArray> arrays, int threads);

// Multiplies in place, in fp32, and rounds to nearest, ties to even. The arrays are written.
void scale_elements(std::span<const ElementArray> arrays, double factor, int threads);

// Elements that are inf or NaN, and where the first is.
struct NonFinite {
  size_t count = 0;
  size_t array = 0;
  size_t index = 0;
};
NonFinite find_non_finite(std::span<const ElementArray> arrays, int threads);

}  // namespace spillover
