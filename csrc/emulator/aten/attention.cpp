// The operators behind torch.nn.functional.scaled_dot_product_attention on CUDA: memory-efficient
// and flash attention, with the shapes and meanings of CUDA's results.
#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>

#include <array>
#include <limits>
#include <tuple>

#include "emulator/aten/attention_math.hpp"
#include "emulator/aten/own_kernels.hpp"

namespace spillover::emulator {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The efficient kernel pads the logsumexp's rows to whole blocks of queries.
constexpr int64_t kLogsumexpAlignment = 32;

OptionalTensor given(const OptionalTensor& tensor) {
  return is_given(tensor) ? tensor : std::nullopt;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> efficient(const Tensor& query, const Tensor& key,
                                                     const Tensor& value,
                                                     const OptionalTensor& bias,
                                                     bool compute_logsumexp, double dropout,
                                                     bool is_causal, std::optional<double> scale) {
  const PhiloxPosition position = dropout_position(dropout);
  const AttentionResult result =
      attention(query, key, value, {given(bias), dropout, is_causal, scale, position});
  Tensor logsumexp;
  if (compute_logsumexp) {
    const int64_t length = query.size(2);
    const int64_t padded =
        (length + kLogsumexpAlignment - 1) / kLogsumexpAlignment * kLogsumexpAlignment;
    logsumexp = at::constant_pad_nd(result.logsumexp.to(at::kFloat), {0, padded - length},
                                    std::numeric_limits<double>::infinity());
  } else {
    logsumexp = at::empty({query.size(0), query.size(1), 0}, query.options().dtype(at::kFloat));
  }
  return {result.output, logsumexp, as_long_scalar(position.seed), as_long_scalar(position.offset)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> efficient_backward(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& bias, const Tensor& output, const Tensor& logsumexp, const Tensor& seed,
    const Tensor& offset, double dropout, std::array<bool, 4> grad_input_mask, bool is_causal,
    std::optional<double> scale) {
  if (!grad_out.defined()) return {};
  const bool has_bias = bias.defined();
  const PhiloxPosition position = from_seed_and_offset(seed, offset, dropout);
  const AttentionOptions options{has_bias ? OptionalTensor(bias) : std::nullopt, dropout, is_causal,
                                 scale, position};
  const AttentionGradients grads =
      attention_backward(grad_out, query, key, value, output, logsumexp.narrow(2, 0, query.size(2)),
                         options, has_bias && grad_input_mask[3]);
  return {grads.query, grads.key, grads.value, grads.bias};
}

using FlashResult =
    std::tuple<Tensor, Tensor, Tensor, Tensor, int64_t, int64_t, Tensor, Tensor, Tensor>;

FlashResult flash(const Tensor& query, const Tensor& key, const Tensor& value, double dropout,
                  bool is_causal, bool return_debug_mask, std::optional<double> scale) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !return_debug_mask, "spillover emulator: operator aten::_scaled_dot_product_flash_attention ",
      "is not emulated with return_debug_mask=True; run it on a real GPU");
  const PhiloxPosition position = dropout_position(dropout);
  const AttentionResult result =
      attention(query, key, value, {std::nullopt, dropout, is_causal, scale, position});
  return {result.output,
          result.logsumexp.to(at::kFloat),
          Tensor(),
          Tensor(),
          query.size(2),
          key.size(2),
          as_rng_state(position),
          at::empty({}, at::kUInt64),
          at::empty({0}, query.options())};
}

std::tuple<Tensor, Tensor, Tensor> flash_backward(
    const Tensor& grad_out, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& output, const Tensor& logsumexp, const OptionalTensor& /*cum_seq_q*/,
    const OptionalTensor& /*cum_seq_k*/, int64_t /*max_q*/, int64_t /*max_k*/, double dropout,
    bool is_causal, const Tensor& rng_state, const Tensor& /*unused*/,
    std::optional<double> scale) {
  if (!grad_out.defined()) return {};
  const PhiloxPosition position = from_rng_state(rng_state, dropout);
  const AttentionGradients grads =
      attention_backward(grad_out, query, key, value, output, logsumexp,
                         {std::nullopt, dropout, is_causal, scale, position}, false);
  return {grads.query, grads.key, grads.value};
}

}  // namespace

void add_attention_kernels(KernelTable& table) {
  add_kernel<&efficient>(table, "aten::_scaled_dot_product_efficient_attention");
  add_kernel<&efficient_backward>(table, "aten::_scaled_dot_product_efficient_attention_backward");
  add_kernel<&flash>(table, "aten::_scaled_dot_product_flash_attention");
  add_kernel<&flash_backward>(table, "aten::_scaled_dot_product_flash_attention_backward");
}

}  // namespace spillover::emulator
