// Flash attention on (batch, length, heads, size) tensors and on sequences of unequal length packed
// one after the other: what nested tensors and torch.nn.attention.varlen call on CUDA.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <tuple>

#include "emulator/aten/attention_math.hpp"
#include "emulator/aten/own_kernels.hpp"
#include "emulator/aten/sequences.hpp"

namespace spillover::emulator {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

void require_emulated(bool condition, const char* name, const char* what) {
  TORCH_CHECK_NOT_IMPLEMENTED(condition, "spillover emulator: operator ", name,
                              " is not emulated with ", what, "; run it on a real GPU");
}

// Negative limits mean none. Flash attention's causal mask has its corner at the bottom right.
Window flash_window(bool is_causal, std::optional<int64_t> left, std::optional<int64_t> right) {
  Window window;
  if (left.value_or(-1) >= 0) window.left = left;
  if (right.value_or(-1) >= 0) window.right = right;
  if (is_causal) window.right = 0;
  return window;
}

// What one call says about all of its sequences.
struct FlashSettings {
  Window window;
  double dropout;
  std::optional<double> scale;
  PhiloxPosition position;

  AttentionOptions options(int64_t query_length, int64_t key_length, const Tensor& like,
                           size_t index = 0) const {
    AttentionOptions result = options_for(window, query_length, key_length, like);
    result.dropout = dropout;
    result.scale = scale;
    result.position = position_of_sequence(position, index);
    return result;
  }
};

struct PackedForward {
  Tensor output;
  Tensor logsumexp;
};

PackedForward packed_forward(const Tensor& query, const Tensor& key, const Tensor& value,
                             const OptionalTensor& query_offsets, const OptionalTensor& key_offsets,
                             const FlashSettings& settings) {
  if (!is_given(query_offsets)) {
    const AttentionResult result =
        attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
                  settings.options(query.size(1), key.size(1), query));
    return {result.output.transpose(1, 2), result.logsumexp.to(at::kFloat).contiguous()};
  }
  PackedForward whole{at::empty_like(query),
                      at::empty({query.size(1), query.size(0)}, query.options().dtype(at::kFloat))};
  const std::vector<Sequence> sequences = sequences_of(*query_offsets, *key_offsets);
  for (size_t i = 0; i < sequences.size(); ++i) {
    const Sequence& s = sequences[i];
    if (s.query_length == 0) continue;
    const AttentionResult result = attention(
        rows_of(query, s.query_start, s.query_length), rows_of(key, s.key_start, s.key_length),
        rows_of(value, s.key_start, s.key_length),
        settings.options(s.query_length, s.key_length, query, i));
    rows_of(whole.output, s.query_start, s.query_length).copy_(result.output);
    whole.logsumexp.narrow(1, s.query_start, s.query_length).copy_(result.logsumexp.squeeze(0));
  }
  return whole;
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
  require_emulated(!return_debug_mask, kName, "return_debug_mask=True");
  require_emulated(!is_given(seqused_k) && !is_given(alibi_slopes) && !is_given(block_table), kName,
                   "seqused_k, alibi_slopes or block_table");
  const PhiloxPosition position = dropout_position(dropout);
  const PackedForward result = packed_forward(
      query, key, value, cum_seq_q, cum_seq_k,
      {flash_window(is_causal, window_left, window_right), dropout, scale, position});
  return {result.output, result.logsumexp, as_rng_state(position), at::empty({}, at::kUInt64),
          at::empty({0}, query.options())};
}

// As torch had it before paged keys, which needs neither of the last two arguments.
FlashForward packed_flash_forward_unpaged(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& cum_seq_q,
    const OptionalTensor& cum_seq_k, int64_t max_q, int64_t max_k, double dropout, bool is_causal,
    bool return_debug_mask, std::optional<double> scale, std::optional<int64_t> window_left,
    std::optional<int64_t> window_right, const OptionalTensor& seqused_k,
    const OptionalTensor& alibi_slopes) {
  return packed_flash_forward(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout,
                              is_causal, return_debug_mask, scale, window_left, window_right,
                              seqused_k, alibi_slopes, std::nullopt, std::nullopt);
}

// The form for inference, into an output that the caller brings.
Tensor packed_flash_forward_inplace(
    const Tensor& out, const Tensor& query, const Tensor& key, const Tensor& value,
    const OptionalTensor& cum_seq_q, const OptionalTensor& cum_seq_k, int64_t max_q, int64_t max_k,
    double dropout, bool is_causal, bool return_debug_mask, std::optional<double> scale,
    std::optional<int64_t> window_left, std::optional<int64_t> window_right,
    const OptionalTensor& seqused_k, const OptionalTensor& alibi_slopes,
    const OptionalTensor& block_table, std::optional<int64_t> num_splits) {
  TORCH_CHECK(dropout == 0.0, "_flash_attention_forward_no_dropout_inplace takes no dropout");
  const FlashForward result = packed_flash_forward(
      query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout, is_causal, return_debug_mask,
      scale, window_left, window_right, seqused_k, alibi_slopes, block_table, num_splits);
  out.copy_(std::get<0>(result));
  return std::get<1>(result);
}

std::tuple<Tensor, Tensor, Tensor> packed_flash_backward(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& output, const Tensor& logsumexp, const Tensor& cum_seq_q, const Tensor& cum_seq_k,
    int64_t /*max_q*/, int64_t /*max_k*/, double dropout, bool is_causal, const Tensor& rng_state,
    const Tensor& /*unused*/, std::optional<double> scale, std::optional<int64_t> window_left,
    std::optional<int64_t> window_right) {
  if (!grad_out.defined()) return {};
  const FlashSettings settings{flash_window(is_causal, window_left, window_right), dropout, scale,
                               from_rng_state(rng_state, dropout)};
  if (!cum_seq_q.defined()) {
    const AttentionGradients grads = attention_backward(
        grad_out.transpose(1, 2), query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
        output.transpose(1, 2), logsumexp, settings.options(query.size(1), key.size(1), query),
        /*wants_bias=*/false);
    return {grads.query.transpose(1, 2), grads.key.transpose(1, 2), grads.value.transpose(1, 2)};
  }
  const Tensor grad_query = at::zeros_like(query);
  const Tensor grad_key = at::zeros_like(key);
  const Tensor grad_value = at::zeros_like(value);
  const std::vector<Sequence> sequences = sequences_of(cum_seq_q, cum_seq_k);
  for (size_t i = 0; i < sequences.size(); ++i) {
    const Sequence& s = sequences[i];
    if (s.query_length == 0) continue;
    const AttentionGradients grads = attention_backward(
        rows_of(grad_out, s.query_start, s.query_length),
        rows_of(query, s.query_start, s.query_length), rows_of(key, s.key_start, s.key_length),
        rows_of(value, s.key_start, s.key_length), rows_of(output, s.query_start, s.query_length),
        logsumexp.narrow(1, s.query_start, s.query_length).unsqueeze(0),
        settings.options(s.query_length, s.key_length, query, i), /*wants_bias=*/false);
    rows_of(grad_query, s.query_start, s.query_length).copy_(grads.query);
    rows_of(grad_key, s.key_start, s.key_length).copy_(grads.key);
    rows_of(grad_value, s.key_start, s.key_length).copy_(grads.value);
  }
  return {grad_query, grad_key, grad_value};
}

// Whether the installed torch's operator has an argument of that name.
bool takes_argument(const char* name, const char* argument) {
  const auto found = c10::Dispatcher::singleton().findSchema({name, ""});
  return found.has_value() && found->schema().argumentIndexWithName(argument).has_value();
}

}  // namespace

void add_varlen_attention_kernels(KernelTable& table) {
  constexpr const char* kForward = "aten::_flash_attention_forward";
  if (takes_argument(kForward, "block_table")) {
    add_kernel<&packed_flash_forward>(table, kForward);
  } else {
    add_kernel<&packed_flash_forward_unpaged>(table, kForward);
  }
  add_kernel<&packed_flash_forward_inplace>(table,
                                            "aten::_flash_attention_forward_no_dropout_inplace");
  add_kernel<&packed_flash_backward>(table, "aten::_flash_attention_backward");
}

}  // namespace spillover::emulator
