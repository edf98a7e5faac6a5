#include "emulator/aten/card.hpp"

#include <ATen/Context.h>

#include "emulator/core/clock_api.h"

namespace spillover::emulator {
namespace {

Card read_card() {
  const auto at = [](const char* key) { return spillover_emulator_profile(key); };
  const auto peak = [&](const char* key) { return at(key) * 1000; };
  Card card;
  card.sm_count = at("gpu.sm_count");
  card.memory_rate = at("gpu.memory_bandwidth_gb_s") * at("gpu.memory_efficiency");
  card.cache_rate = at("gpu.l2_bandwidth_gb_s");
  card.cache_bytes = at("gpu.l2_mib") * 1048576;
  card.ramp_ns = at("gpu.kernel_ramp_us") * 1000;
  card.matmul_efficiency = at("gpu.matmul_efficiency");
  card.matmul_k_ramp = at("gpu.matmul_k_ramp");
  card.convolution_efficiency = at("gpu.convolution_efficiency");
  card.attention_forward_efficiency = at("gpu.attention_forward_efficiency");
  card.attention_backward_efficiency = at("gpu.attention_backward_efficiency");
  card.attention_key_ramp = at("gpu.attention_key_ramp");
  card.attention_head_ramp = at("gpu.attention_head_ramp");
  card.peak_fp64 = peak("gpu.peak_fp64_tflops");
  card.peak_fp32 = peak("gpu.peak_fp32_tflops");
  card.peak_tf32 = peak("gpu.peak_tf32_tflops");
  card.peak_fp16 = peak("gpu.peak_fp16_tflops");
  card.peak_bf16 = peak("gpu.peak_bf16_tflops");
  card.peak_fp8 = peak("gpu.peak_fp8_tflops");
  card.peak_int8 = peak("gpu.peak_int8_tops");
  return card;
}

}  // namespace

const Card& Card::instance() {
  static const Card card = read_card();
  return card;
}

double Card::peak(c10::ScalarType type) const {
  switch (type) {
    case c10::kDouble:
    case c10::kComplexDouble:
      return peak_fp64;
    case c10::kHalf:
      return peak_fp16;
    case c10::kBFloat16:
      return peak_bf16;
    case c10::kFloat8_e4m3fn:
    case c10::kFloat8_e5m2:
      return peak_fp8;
    case c10::kChar:
    case c10::kByte:
      return peak_int8;
    default:
      return at::globalContext().allowTF32CuBLAS() ? peak_tf32 : peak_fp32;
  }
}

}  // namespace spillover::emulator
