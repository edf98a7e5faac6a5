// Attention on (batch, length, heads, size) tensors and on sequences of unequal length packed one
// after the other: what nested tensors and torch.nn.attention.varlen call on CUDA.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>

#include <tuple>
#include <vector>

#include "emulator/aten/attention_math.hpp"
#include "emulator/aten/own_kernels.hpp"

namespace spillover::emulator {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

void require_emulated(bool condition, const char* name, const char* what) {
  TORCH_CHECK_NOT_IMPLEMENTED(condition, "spillover emulator: operator ", name,
                              " is not emulated with ", what, "; run it on a real GPU");
}

// One sequence: where its queries and keys lie in the packed tensors.
struct Sequence {
  int64_t query_start, query_length, key_start, key_length;
};

std::vector<Sequence> sequences_of(const Tensor& query_offsets, const Tensor& key_offsets) {
  const Tensor queries = query_offsets.to(at::kLong).contiguous();
  const Tensor keys = key_offsets.to(at::kLong).contiguous();
  const int64_t* q = queries.const_data_ptr<int64_t>();
  const int64_t* k = keys.const_data_ptr<int64_t>();
  std::vector<Sequence> sequences;
  for (int64_t i = 0; i + 1 < queries.numel(); ++i) {
    sequences.push_back({q[i], q[i + 1] - q[i], k[i], k[i + 1] - k[i]});
  }
  return sequences;
}

// (length, heads, size) rows of a packed tensor as (1, heads, length, size).
Tensor rows(const Tensor& packed, int64_t start, int64_t length) {
  return packed.narrow(0, start, length).unsqueeze(0).transpose(1, 2);
}

AttentionOptions options_for(bool is_causal, std::optional<double> scale, int64_t query_length,
                             int64_t key_length, const Tensor& like) {
  AttentionOptions options;
  options.scale = scale;
  // Flash attention's causal mask has its corner at the bottom right.
  if (is_causal && query_length == key_length) {
    options.is_causal = true;
  } else if (is_causal) {
    options.bias = bottom_right_causal_bias(query_length, key_length, like.options());
  }
  return options;
}

using FlashForward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

FlashForward packed_flash_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& cum_seq_q,
    const OptionalTensor& cum_seq_k, int64_t /*max_q*/, int64_t /*max_k*/, double dropout,
    bool is_causal, bool return_debug_mask, std::optional<double> scale,
    std::optional<int64_t> window_left, std::optional<int64_t> window_right,
    const OptionalTensor& seqused_k, const OptionalTensor& alibi_slopes,
    const OptionalTensor& block_table, std::optional<int64_t> /*num_splits*/) {
  constexpr const char* kName = "aten::_flash_attention_forward";
  require_emulated(dropout == 0.0, kName, "dropout");
  require_emulated(!return_debug_mask, kName, "return_debug_mask=True");
  require_emulated(window_left.value_or(-1) < 0 && (is_causal || window_right.value_or(-1) < 0),
                   kName, "a window");
  require_emulated(!is_given(seqused_k) && !is_given(alibi_slopes) && !is_given(block_table), kName,
                   "seqused_k, alibi_slopes or block_table");
  const Tensor rng_state = at::zeros_like(at::empty({2}, at::kUInt64));
  const Tensor unused = at::empty({}, at::kUInt64);
  const Tensor debug_mask = at::empty({0}, query.options());
  if (!is_given(cum_seq_q)) {
    const AttentionResult result =
        attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
                  options_for(is_causal, scale, query.size(1), key.size(1), query));
    return {result.output.transpose(1, 2), result.logsumexp.to(at::kFloat).contiguous(), rng_state,
            unused, debug_mask};
  }
  const Tensor output = at::empty_like(query);
  const Tensor logsumexp =
      at::empty({query.size(1), query.size(0)}, query.options().dtype(at::kFloat));
  for (const Sequence& s : sequences_of(*cum_seq_q, *cum_seq_k)) {
    if (s.query_length == 0) continue;
    const AttentionResult result =
        attention(rows(query, s.query_start, s.query_length), rows(key, s.key_start, s.key_length),
                  rows(value, s.key_start, s.key_length),
                  options_for(is_causal, scale, s.query_length, s.key_length, query));
    rows(output, s.query_start, s.query_length).copy_(result.output);
    logsumexp.narrow(1, s.query_start, s.query_length).copy_(result.logsumexp.squeeze(0));
  }
  return {output, logsumexp, rng_state, unused, debug_mask};
}

std::tuple<Tensor, Tensor, Tensor> packed_flash_backward(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& output, const Tensor& logsumexp, const Tensor& cum_seq_q, const Tensor& cum_seq_k,
    int64_t /*max_q*/, int64_t /*max_k*/, double dropout, bool is_causal,
    const Tensor& /*rng_state*/, const Tensor& /*unused*/, std::optional<double> scale,
    std::optional<int64_t> window_left, std::optional<int64_t> window_right) {
  constexpr const char* kName = "aten::_flash_attention_backward";
  require_emulated(dropout == 0.0, kName, "dropout");
  require_emulated(window_left.value_or(-1) < 0 && (is_causal || window_right.value_or(-1) < 0),
                   kName, "a window");
  if (!grad_out.defined()) return {};
  if (!cum_seq_q.defined()) {
    const AttentionGradients grads = attention_backward(
        grad_out.transpose(1, 2), query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
        output.transpose(1, 2), logsumexp,
        options_for(is_causal, scale, query.size(1), key.size(1), query), /*wants_bias=*/false);
    return {grads.query.transpose(1, 2), grads.key.transpose(1, 2), grads.value.transpose(1, 2)};
  }
  const Tensor grad_query = at::zeros_like(query);
  const Tensor grad_key = at::zeros_like(key);
  const Tensor grad_value = at::zeros_like(value);
  for (const Sequence& s : sequences_of(cum_seq_q, cum_seq_k)) {
    if (s.query_length == 0) continue;
    const AttentionGradients grads = attention_backward(
        rows(grad_out, s.query_start, s.query_length), rows(query, s.query_start, s.query_length),
        rows(key, s.key_start, s.key_length), rows(value, s.key_start, s.key_length),
        rows(output, s.query_start, s.query_length),
        logsumexp.narrow(1, s.query_start, s.query_length).unsqueeze(0),
        options_for(is_causal, scale, s.query_length, s.key_length, query), /*wants_bias=*/false);
    rows(grad_query, s.query_start, s.query_length).copy_(grads.query);
    rows(grad_key, s.key_start, s.key_length).copy_(grads.key);
    rows(grad_value, s.key_start, s.key_length).copy_(grads.value);
  }
  return {grad_query, grad_key, grad_value};
}

}  // namespace

void add_varlen_attention_kernels(KernelTable& table) {
  add_kernel<&packed_flash_forward>(table, "aten::_flash_attention_forward");
  add_kernel<&packed_flash_backward>(table, "aten::_flash_attention_backward");
}

}  // namespace spillover::emulator
