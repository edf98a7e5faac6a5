// The same kernels for the emulated device, with what they touch.
#include "emulator/host_kernels/registration.hpp"

#include "sample_kernels.cu"

SPILLOVER_DYNAMIC_SHARED(float, tile);

extern "C" int spillover_register_host_kernels() {
  using namespace spillover::host_kernels;
  const int results[] = {
      register_kernel<axpy,
                      [](const Shape&, float, const float* x, float* y, unsigned n) -> Ranges {
                        return {reads(x, n * sizeof *x), writes(y, n * sizeof *y)};
                      }>("axpy"),
      register_kernel<squared_norm,
                      [](const Shape&, const float* x, unsigned n, double* sum) -> Ranges {
                        return {reads(x, n * sizeof *x), writes(sum, sizeof *sum)};
                      }>("squared_norm"),
      register_kernel<transpose_to_float,
                      [](const Shape&, const __nv_bfloat16* in, float* out, unsigned rows,
                         unsigned columns) -> Ranges {
                        const std::size_t count = std::size_t{rows} * columns;
                        return {reads(in, count * sizeof *in), writes(out, count * sizeof *out)};
                      }>("transpose_to_float"),
      register_kernel<votes,
                      [](const Shape& shape, unsigned* ballots, int* counts) -> Ranges {
                        return {writes(ballots, shape.block[0] * sizeof *ballots),
                                writes(counts, shape.block[0] * sizeof *counts)};
                      }>("votes"),
      register_kernel<hangs,
                      [](const Shape& shape, int* out) -> Ranges {
                        return {writes(out, shape.block[0] * sizeof *out)};
                      }>("hangs"),
  };
  for (const int result : results) {
    if (result != 0) return result;
  }
  return 0;
}
