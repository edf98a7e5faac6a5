// Memory-efficient attention on (batch, length, heads, size) tensors and on packed sequences, with
// the shapes and meanings of CUDA's results. scaled_dot_product_attention's own form of it is in
// attention.cpp.
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "emulator/aten/attention_math.hpp"
#include "emulator/aten/own_kernels.hpp"
#include "emulator/aten/sequences.hpp"

namespace spillover::emulator {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

enum MaskType : int64_t { kNoMask = 0, kCausalFromTopLeft = 1, kCausalFromBottomRight = 2 };

Window efficient_window(int64_t mask_type, std::optional<int64_t> window_size) {
  TORCH_CHECK(mask_type >= kNoMask && mask_type <= kCausalFromBottomRight,
              "invalid value for custom_mask_type: ", mask_type);
  Window window;
  window.from_bottom_right = mask_type != kCausalFromTopLeft;
  if (mask_type != kNoMask) window.right = 0;
  // A window of n tokens contains the query's own.
  if (window_size.value_or(0) > 0) window.left = *window_size - 1;
  return window;
}

struct EfficientSettings {
  OptionalTensor bias;
  Window window;
  double dropout;
  std::optional<double> scale;
  PhiloxPosition position;

  AttentionOptions options(int64_t query_length, int64_t key_length, const Tensor& like,
                           size_t index = 0) const {
    AttentionOptions result = options_for(window, query_length, key_length, like);
    if (is_given(bias)) {
      if (result.is_causal) {
        Window explicit_window = window;
        explicit_window.left = query_length;
        result = options_for(explicit_window, query_length, key_length, like);
      }
      result.bias = result.bias ? *bias + *result.bias : *bias;
    }
    result.dropout = dropout;
    result.scale = scale;
    result.position = position_of_sequence(position, index);
    return result;
  }
};

int64_t padded_length(int64_t length) {
  constexpr int64_t kLogsumexpAlignment = 32;
  return (length + kLogsumexpAlignment - 1) / kLogsumexpAlignment * kLogsumexpAlignment;
}

void require_full_sequences(const OptionalTensor& seqlen_k, const char* name) {
  TORCH_CHECK_NOT_IMPLEMENTED(!is_given(seqlen_k), "spillover emulator: operator ", name,
                              " is not emulated with seqlen_k; run it on a real GPU");
}

using EfficientForward = std::tuple<Tensor, Tensor, Tensor, Tensor, int64_t, int64_t>;

EfficientForward packed_efficient_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& bias,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    std::optional<int64_t> max_seqlen_q, std::optional<int64_t> max_seqlen_k, double dropout,
    int64_t mask_type, bool compute_logsumexp, std::optional<double> scale,
    const OptionalTensor& seqlen_k, std::optional<int64_t> window_size) {
  require_full_sequences(seqlen_k, "aten::_efficient_attention_forward");
  const PhiloxPosition position = dropout_position(dropout);
  const EfficientSettings settings{bias, efficient_window(mask_type, window_size), dropout, scale,
                                   position};
  const Tensor seed = as_long_scalar(position.seed);
  const Tensor offset = as_long_scalar(position.offset);
  const auto lse_options = query.options().dtype(at::kFloat);
  constexpr double kInfinity = std::numeric_limits<double>::infinity();

  if (!is_given(cu_seqlens_q)) {
    const int64_t length = query.size(1);
    const AttentionResult result =
        attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
                  settings.options(length, key.size(1), query));
    const int64_t rows = compute_logsumexp ? padded_length(length) : 0;
    const Tensor logsumexp = at::full({query.size(0), query.size(2), rows}, kInfinity, lse_options);
    if (compute_logsumexp) logsumexp.narrow(2, 0, length).copy_(result.logsumexp);
    return {result.output.transpose(1, 2), logsumexp, seed, offset, length, key.size(1)};
  }
  const std::vector<Sequence> sequences = sequences_of(*cu_seqlens_q, *cu_seqlens_k);
  const int64_t longest = max_seqlen_q.value_or(query.size(1));
  const Tensor output =
      at::empty({1, query.size(1), query.size(2), value.size(3)}, query.options());
  const Tensor logsumexp = at::full({static_cast<int64_t>(sequences.size()), query.size(2),
                                     compute_logsumexp ? padded_length(longest) : 0},
                                    kInfinity, lse_options);
  for (size_t i = 0; i < sequences.size(); ++i) {
    const Sequence& s = sequences[i];
    if (s.query_length == 0) continue;
    const AttentionResult result = attention(
        rows_of(query[0], s.query_start, s.query_length),
        rows_of(key[0], s.key_start, s.key_length), rows_of(value[0], s.key_start, s.key_length),
        settings.options(s.query_length, s.key_length, query, i));
    rows_of(output[0], s.query_start, s.query_length).copy_(result.output);
    if (compute_logsumexp) {
      logsumexp[static_cast<int64_t>(i)].narrow(1, 0, s.query_length).copy_(result.logsumexp[0]);
    }
  }
  return {output, logsumexp, seed, offset, longest, max_seqlen_k.value_or(key.size(1))};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> packed_efficient_backward(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value,
    const OptionalTensor& bias, const Tensor& output, const OptionalTensor& cu_seqlens_q,
    const OptionalTensor& cu_seqlens_k, int64_t /*max_seqlen_q*/, int64_t /*max_seqlen_k*/,
    const Tensor& logsumexp, double dropout, const Tensor& seed, const Tensor& offset,
    int64_t mask_type, bool bias_requires_grad, std::optional<double> scale,
    std::optional<int64_t> /*num_splits_key*/, std::optional<int64_t> window_size,
    bool /*shared_storage_dqdkdv*/) {
  if (!grad_out.defined()) return {};
  const EfficientSettings settings{bias, efficient_window(mask_type, window_size), dropout, scale,
                                   from_seed_and_offset(seed, offset, dropout)};
  const bool wants_bias = bias_requires_grad && is_given(bias);
  if (!is_given(cu_seqlens_q)) {
    AttentionOptions options = settings.options(query.size(1), key.size(1), query);
    AttentionGradients grads = attention_backward(
        grad_out.transpose(1, 2), query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
        output.transpose(1, 2), logsumexp.narrow(2, 0, query.size(1)), options, wants_bias);
    if (wants_bias) grads.bias = grads.bias.sum_to_size(bias->sizes());
    return {grads.query.transpose(1, 2), grads.key.transpose(1, 2), grads.value.transpose(1, 2),
            grads.bias};
  }
  TORCH_CHECK_NOT_IMPLEMENTED(
      !wants_bias,
      "spillover emulator: operator aten::_efficient_attention_backward is not "
      "emulated with a bias that requires a gradient on packed sequences; run it on a real GPU");
  const Tensor grad_query = at::zeros_like(query);
  const Tensor grad_key = at::zeros_like(key);
  const Tensor grad_value = at::zeros_like(value);
  const std::vector<Sequence> sequences = sequences_of(*cu_seqlens_q, *cu_seqlens_k);
  for (size_t i = 0; i < sequences.size(); ++i) {
    const Sequence& s = sequences[i];
    if (s.query_length == 0) continue;
    const AttentionGradients grads = attention_backward(
        rows_of(grad_out[0], s.query_start, s.query_length),
        rows_of(query[0], s.query_start, s.query_length),
        rows_of(key[0], s.key_start, s.key_length), rows_of(value[0], s.key_start, s.key_length),
        rows_of(output[0], s.query_start, s.query_length),
        logsumexp[static_cast<int64_t>(i)].narrow(1, 0, s.query_length).unsqueeze(0),
        settings.options(s.query_length, s.key_length, query, i), /*wants_bias=*/false);
    rows_of(grad_query[0], s.query_start, s.query_length).copy_(grads.query);
    rows_of(grad_key[0], s.key_start, s.key_length).copy_(grads.key);
    rows_of(grad_value[0], s.key_start, s.key_length).copy_(grads.value);
  }
  return {grad_query, grad_key, grad_value, Tensor()};
}

}  // namespace

void add_efficient_attention_kernels(KernelTable& table) {
  add_kernel<&packed_efficient_forward>(table, "aten::_efficient_attention_forward");
  add_kernel<&packed_efficient_backward>(table, "aten::_efficient_attention_backward");
}

}  // namespace spillover::emulator
