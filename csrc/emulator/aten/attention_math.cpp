#include "emulator/aten/attention_math.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/scalar_tensor.h>
#include <c10/cuda/CUDAFunctions.h>

#include <cmath>
#include <limits>

namespace spillover::emulator {
namespace {

using at::Tensor;

constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

// Grouped queries: each key and value head serves several query heads.
Tensor repeat_heads(const Tensor& tensor, int64_t heads) {
  if (tensor.size(1) == heads) return tensor;
  return tensor.repeat_interleave(heads / tensor.size(1), /*dim=*/1);
}

Tensor sum_repeated_heads(const Tensor& grad, int64_t heads) {
  if (!grad.defined() || grad.size(1) == heads) return grad;
  return grad.unflatten(1, {heads, grad.size(1) / heads}).sum(2);
}

bool has_dense_rows(const Tensor& tensor) {
  return tensor.stride(-1) == 1;
}

// The conditions of torch's flash kernel for the CPU.
bool cpu_kernel_applies(const Tensor& query, const Tensor& key, const Tensor& value,
                        const AttentionOptions& options) {
  const bool sizes_fit = query.size(-1) == key.size(-1) && key.size(-1) == value.size(-1) &&
                         query.numel() > 0 && key.numel() > 0;
  const bool layouts_fit = has_dense_rows(query) && has_dense_rows(key) && has_dense_rows(value);
  const bool bias_fits = !options.bias || (options.bias->dim() == 4 && !options.is_causal);
  return sizes_fit && layouts_fit && bias_fits && options.dropout == 0.0;
}

Tensor causal_mask(int64_t query_length, int64_t key_length, int64_t diagonal) {
  return at::ones({query_length, key_length}, at::kBool).tril(diagonal).logical_not();
}

// What both directions of the spelled-out form need.
struct Expanded {
  Tensor query, key, value, scores, keep;
  double scale;
};

Expanded expand(const Tensor& query, const Tensor& key, const Tensor& value,
                const AttentionOptions& options) {
  const auto type = query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  Expanded e{
      query.to(type), key.to(type),
      value.to(type), Tensor(),
      Tensor(),       options.scale.value_or(1.0 / std::sqrt(static_cast<double>(query.size(-1))))};
  e.scores = at::matmul(e.query, e.key.transpose(-2, -1)) * e.scale;
  if (options.bias) e.scores = e.scores + options.bias->to(type);
  if (options.is_causal) {
    e.scores.masked_fill_(causal_mask(query.size(-2), key.size(-2), 0), kMinusInfinity);
  }
  if (options.dropout > 0.0) {
    e.keep = at::empty(e.scores.sizes(), e.scores.options());
    e.keep.bernoulli_(1.0 - options.dropout, generator_at(options.position));
    e.keep.mul_(options.dropout < 1.0 ? 1.0 / (1.0 - options.dropout) : 0.0);
  }
  return e;
}

// A row that may see nothing has a logsumexp of minus infinity and attends to nothing.
Tensor probabilities(const Expanded& e, const Tensor& logsumexp) {
  return at::exp(e.scores - logsumexp.to(e.scores.scalar_type()).unsqueeze(-1)).nan_to_num_(0.0);
}

// CUDA's kernels write (batch, length, heads, size) and return it transposed.
Tensor in_device_layout(const Tensor& output) {
  return output.transpose(1, 2).contiguous().transpose(1, 2);
}

}  // namespace

AttentionResult attention(const Tensor& query, const Tensor& key, const Tensor& value,
                          const AttentionOptions& options) {
  const int64_t heads = query.size(1);
  const Tensor keys = repeat_heads(key, heads);
  const Tensor values = repeat_heads(value, heads);
  if (cpu_kernel_applies(query, keys, values, options)) {
    auto [output, logsumexp] = at::_scaled_dot_product_flash_attention_for_cpu(
        query, keys, values, /*dropout_p=*/0.0, options.is_causal, options.bias, options.scale);
    return {output, logsumexp};
  }
  const Expanded e = expand(query, keys, values, options);
  const Tensor logsumexp = at::logsumexp(e.scores, -1);
  Tensor weights = probabilities(e, logsumexp);
  if (e.keep.defined()) weights = weights * e.keep;
  const Tensor output = at::matmul(weights, e.value).to(query.scalar_type());
  return {in_device_layout(output), logsumexp};
}

AttentionGradients attention_backward(const Tensor& grad_out, const Tensor& query,
                                      const Tensor& key, const Tensor& value, const Tensor& output,
                                      const Tensor& logsumexp, const AttentionOptions& options,
                                      bool wants_bias) {
  const int64_t heads = query.size(1);
  const Tensor keys = repeat_heads(key, heads);
  const Tensor values = repeat_heads(value, heads);
  if (!wants_bias && cpu_kernel_applies(query, keys, values, options)) {
    auto [grad_query, grad_key, grad_value] =
        at::_scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, query, keys, values, output, logsumexp, /*dropout_p=*/0.0, options.is_causal,
            options.bias, options.scale);
    return {grad_query, sum_repeated_heads(grad_key, key.size(1)),
            sum_repeated_heads(grad_value, value.size(1)), Tensor()};
  }
  const Expanded e = expand(query, keys, values, options);
  const Tensor weights = probabilities(e, logsumexp);
  const Tensor grad = grad_out.to(e.scores.scalar_type());
  Tensor grad_weights = at::matmul(grad, e.value.transpose(-2, -1));
  if (e.keep.defined()) grad_weights = grad_weights * e.keep;
  const Tensor row_sums = (grad_weights * weights).sum(-1, /*keepdim=*/true);
  const Tensor grad_scores = weights * (grad_weights - row_sums);
  const Tensor used = e.keep.defined() ? weights * e.keep : weights;

  AttentionGradients result;
  result.query = (at::matmul(grad_scores, e.key) * e.scale).to(query.scalar_type());
  result.key = (at::matmul(grad_scores.transpose(-2, -1), e.query) * e.scale).to(key.scalar_type());
  result.value = at::matmul(used.transpose(-2, -1), grad).to(value.scalar_type());
  result.key = sum_repeated_heads(result.key, key.size(1));
  result.value = sum_repeated_heads(result.value, value.size(1));
  if (wants_bias) {
    result.bias = grad_scores.sum_to_size(options.bias->sizes()).to(options.bias->scalar_type());
  }
  return result;
}

PhiloxPosition dropout_position(double dropout) {
  if (dropout == 0.0) return {0, 0};
  return take_default_position();
}

Tensor as_rng_state(PhiloxPosition position) {
  Tensor state = at::empty({2}, at::kUInt64);
  state.mutable_data_ptr<uint64_t>()[0] = position.seed;
  state.mutable_data_ptr<uint64_t>()[1] = position.offset;
  return state;
}

PhiloxPosition from_rng_state(const Tensor& state, double dropout) {
  if (dropout == 0.0) return {0, 0};
  return {state.const_data_ptr<uint64_t>()[0], state.const_data_ptr<uint64_t>()[1]};
}

Tensor as_long_scalar(uint64_t value) {
  return at::scalar_tensor(static_cast<int64_t>(value), at::kLong);
}

PhiloxPosition from_seed_and_offset(const Tensor& seed, const Tensor& offset, double dropout) {
  if (dropout == 0.0) return {0, 0};
  return {static_cast<uint64_t>(seed.item<int64_t>()),
          static_cast<uint64_t>(offset.item<int64_t>())};
}

}  // namespace spillover::emulator
