// Scaled dot-product attention on CPU tensors of shape (batch, heads, length, head size), for the
// kernels of attention.cpp and varlen_attention.cpp. Pure functions; any thread may call them.
//
// Where torch's own CPU attention can take the arguments it does the work, so that results equal
// the CPU's to the last bit; otherwise (dropout, a gradient for the bias, a value size of its own)
// the formulas are spelled out.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "emulator/aten/random.hpp"

namespace spillover::emulator {

struct AttentionOptions {
  // Added to the scores; broadcasts to (batch, heads, query length, key length).
  std::optional<at::Tensor> bias;
  double dropout = 0.0;
  // Query i sees keys up to i (the mask's corner is at the top left).
  bool is_causal = false;
  std::optional<double> scale;
  // Where the dropout mask is drawn from.
  PhiloxPosition position{0, 0};
};

struct AttentionResult {
  at::Tensor output;
  at::Tensor logsumexp;
};

struct AttentionGradients {
  at::Tensor query;
  at::Tensor key;
  at::Tensor value;
  at::Tensor bias;
};

AttentionResult attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                          const AttentionOptions& options);

// logsumexp has the forward's shape, without padding.
AttentionGradients attention_backward(const at::Tensor& grad_out, const at::Tensor& query,
                                      const at::Tensor& key, const at::Tensor& value,
                                      const at::Tensor& output, const at::Tensor& logsumexp,
                                      const AttentionOptions& options, bool wants_bias);

// Where this call's dropout mask is drawn from. Only dropout draws random numbers, and only then
// does the device's generator move.
PhiloxPosition dropout_position(double dropout);

// How the kernels hand that position from the forward to the backward: flash attention as one
// tensor, memory-efficient attention as two.
at::Tensor as_rng_state(PhiloxPosition position);
PhiloxPosition from_rng_state(const at::Tensor& state, double dropout);
at::Tensor as_long_scalar(uint64_t value);
PhiloxPosition from_seed_and_offset(const at::Tensor& seed, const at::Tensor& offset,
                                    double dropout);

}  // namespace spillover::emulator
