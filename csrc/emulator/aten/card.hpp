// The numbers of the clock's profile that the cost rules use, read once. Constant; any thread may
// use it. Symbols are those of docs/cost-model.md.
#pragma once

#include <c10/core/ScalarType.h>

namespace spillover::emulator {

struct Card {
  static const Card& instance();

  // FLOP a nanosecond.
  double peak(c10::ScalarType type) const;

  // Bytes a nanosecond; what fits half of the cache is in it already.
  double rate(double bytes) const { return fits_cache(bytes) ? cache_rate : memory_rate; }
  bool fits_cache(double bytes) const { return bytes <= cache_bytes / 2; }

  double sm_count = 0;
  double memory_rate = 0;
  double cache_rate = 0;
  double cache_bytes = 0;
  double ramp_ns = 0;
  double matmul_efficiency = 0;
  double matmul_k_ramp = 0;
  double convolution_efficiency = 0;
  double attention_forward_efficiency = 0;
  double attention_backward_efficiency = 0;
  double attention_key_ramp = 0;
  double attention_head_ramp = 0;
  double peak_fp64 = 0;
  double peak_fp32 = 0;
  double peak_tf32 = 0;
  double peak_fp16 = 0;
  double peak_bf16 = 0;
  double peak_fp8 = 0;
  double peak_int8 = 0;
};

}  // namespace spillover::emulator
