// RMSNorm's backward and the parts of synchronised batch normalisation, which torch has for CUDA
// alone.
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/var_mean.h>

#include <array>
#include <numeric>
#include <tuple>
#include <vector>

#include "emulator/aten/own_kernels.hpp"

namespace spillover::emulator {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using TensorPair = std::tuple<Tensor, Tensor>;

// The type that CUDA's kernels compute in.
c10::ScalarType accumulate_type(const Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// y = x * rstd * w. With z = x * rstd, dx = rstd * (g w - z mean(g w z)) and dw = sum(g z).
TensorPair rms_norm_backward(const Tensor& grad_out, const Tensor& input,
                             std::vector<int64_t> normalized_shape, const Tensor& rstd,
                             const OptionalTensor& weight, std::array<bool, 2> output_mask) {
  const auto type = accumulate_type(input);
  const auto normalized_dims = static_cast<int64_t>(normalized_shape.size());
  std::vector<int64_t> inner(normalized_shape.size());
  std::iota(inner.begin(), inner.end(), input.dim() - normalized_dims);
  std::vector<int64_t> outer(static_cast<size_t>(input.dim() - normalized_dims));
  std::iota(outer.begin(), outer.end(), 0);

  const Tensor grad = grad_out.to(type);
  const Tensor normalized = input.to(type) * rstd.to(type);
  Tensor grad_input;
  Tensor grad_weight;
  if (output_mask[0]) {
    const Tensor scaled = is_given(weight) ? grad * weight->to(type) : grad;
    const Tensor mean = (scaled * normalized).mean(inner, /*keepdim=*/true);
    grad_input = ((scaled - normalized * mean) * rstd.to(type)).to(input.scalar_type());
  }
  if (output_mask[1] && is_given(weight)) {
    Tensor sum = grad * normalized;
    if (!outer.empty()) sum = sum.sum(outer);
    grad_weight = sum.to(weight->scalar_type());
  }
  return {grad_input, grad_weight};
}

// Dimensions of a (batch, channel, ...) tensor without the channel.
std::vector<int64_t> all_but_channel(const Tensor& input) {
  std::vector<int64_t> dims{0};
  for (int64_t i = 2; i < input.dim(); ++i) dims.push_back(i);
  return dims;
}

// Shapes a tensor of channels for broadcasting against input.
Tensor as_channels(const Tensor& channels, const Tensor& input) {
  std::vector<int64_t> shape(static_cast<size_t>(input.dim()), 1);
  shape[1] = channels.numel();
  return channels.to(accumulate_type(input)).view(shape);
}

TensorPair batch_norm_stats(const Tensor& input, double eps) {
  const auto [variance, mean] =
      at::var_mean(input.to(accumulate_type(input)), all_but_channel(input), /*unbiased=*/false);
  return {mean, at::rsqrt(variance + eps)};
}

void update_running(const OptionalTensor& running, const Tensor& batch, double momentum) {
  if (!is_given(running)) return;
  running->mul_(1.0 - momentum).add_(batch.to(running->scalar_type()), momentum);
}

// mean and invstd hold a row for each process; counts says how many elements each row stands for.
TensorPair gather_with_counts(const Tensor& input, const Tensor& mean, const Tensor& invstd,
                              const OptionalTensor& running_mean, const OptionalTensor& running_var,
                              double momentum, double eps, const Tensor& counts) {
  const auto type = accumulate_type(input);
  const Tensor rows = counts.to(type).view({-1, 1});
  const Tensor total = rows.sum();
  const Tensor means = mean.to(type);
  const Tensor global_mean = (means * rows).sum(0) / total;
  const Tensor variances = invstd.to(type).pow(-2) - eps;
  const Tensor squares = ((variances + (means - global_mean).square()) * rows).sum(0);
  update_running(running_mean, global_mean, momentum);
  update_running(running_var, squares / (total - 1), momentum);
  return {global_mean, at::rsqrt(squares / total + eps)};
}

TensorPair gather(const Tensor& input, const Tensor& mean, const Tensor& invstd,
                  const OptionalTensor& running_mean, const OptionalTensor& running_var,
                  double momentum, double eps, int64_t count) {
  const Tensor counts =
      at::ones_like(mean.select(1, 0), at::kFloat).mul_(static_cast<double>(count));
  return gather_with_counts(input, mean, invstd, running_mean, running_var, momentum, eps, counts);
}

Tensor elementwise(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                   const Tensor& mean, const Tensor& invstd, double /*eps*/) {
  Tensor result = input.to(accumulate_type(input));
  result = (result - as_channels(mean, input)) * as_channels(invstd, input);
  if (is_given(weight)) result = result * as_channels(*weight, input);
  if (is_given(bias)) result = result + as_channels(*bias, input);
  return result.to(input.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_reduce(
    const Tensor& grad_out, const Tensor& input, const Tensor& mean, const Tensor& invstd,
    const OptionalTensor& weight, bool input_g, bool weight_g, bool bias_g) {
  const auto type = accumulate_type(input);
  const std::vector<int64_t> dims = all_but_channel(input);
  const Tensor grad = grad_out.to(type);
  const Tensor sum_dy = grad.sum(dims);
  const Tensor sum_dy_xmu = (grad * (input.to(type) - as_channels(mean, input))).sum(dims);
  const auto parameter_type = is_given(weight) ? weight->scalar_type() : type;
  Tensor grad_weight;
  Tensor grad_bias;
  if (weight_g) grad_weight = (sum_dy_xmu * invstd.to(type)).to(parameter_type);
  if (bias_g) grad_bias = sum_dy.to(parameter_type).clone();
  if (!input_g) return {Tensor(), Tensor(), grad_weight, grad_bias};
  return {sum_dy, sum_dy_xmu, grad_weight, grad_bias};
}

Tensor backward_elementwise(const Tensor& grad_out, const Tensor& input, const Tensor& mean,
                            const Tensor& invstd, const OptionalTensor& weight,
                            const Tensor& sum_dy, const Tensor& sum_dy_xmu, const Tensor& count) {
  const auto type = accumulate_type(input);
  const Tensor total = count.to(type).sum();
  const Tensor rstd = as_channels(invstd, input);
  const Tensor centred = input.to(type) - as_channels(mean, input);
  Tensor grad = grad_out.to(type) - as_channels(sum_dy, input) / total -
                centred * rstd.square() * (as_channels(sum_dy_xmu, input) / total);
  grad = grad * rstd;
  if (is_given(weight)) grad = grad * as_channels(*weight, input);
  return grad.to(input.scalar_type());
}

}  // namespace

void add_normalization_kernels(KernelTable& table) {
  add_kernel<&rms_norm_backward>(table, "aten::_fused_rms_norm_backward");
  add_kernel<&batch_norm_stats>(table, "aten::batch_norm_stats");
  add_kernel<&gather>(table, "aten::batch_norm_gather_stats");
  add_kernel<&gather_with_counts>(table, "aten::batch_norm_gather_stats_with_counts");
  add_kernel<&elementwise>(table, "aten::batch_norm_elemt");
  add_kernel<&backward_reduce>(table, "aten::batch_norm_backward_reduce");
  add_kernel<&backward_elementwise>(table, "aten::batch_norm_backward_elemt");
}

}  // namespace spillover::emulator
