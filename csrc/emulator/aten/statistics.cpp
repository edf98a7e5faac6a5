// Layer and batch normalisation with CUDA's statistics: in single precision for half-precision
// inputs, whatever the parameters are (the CPU's are as wide as the parameters), and those of the
// running statistics where a batch norm is not trained (the CPU returns none).
//
// The CPU computes with single-precision statistics where the parameters are in single precision,
// so it is given those.
#include <ATen/core/Tensor.h>
#include <ATen/ops/native_batch_norm.h>
#include <ATen/ops/native_batch_norm_backward.h>
#include <ATen/ops/native_layer_norm.h>
#include <ATen/ops/native_layer_norm_backward.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rsqrt.h>

#include <array>
#include <tuple>
#include <vector>

#include "emulator/aten/own_kernels.hpp"

namespace spillover::emulator {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Triple = std::tuple<Tensor, Tensor, Tensor>;

bool is_narrow(const Tensor& input) {
  return input.scalar_type() == at::kHalf || input.scalar_type() == at::kBFloat16;
}

OptionalTensor widened(const OptionalTensor& parameter) {
  return is_given(parameter) ? OptionalTensor(parameter->to(at::kFloat)) : std::nullopt;
}

// Without a parameter the CPU would go by the input's type.
OptionalTensor wide_weight(const OptionalTensor& weight, const Tensor& input,
                           at::IntArrayRef shape) {
  return is_given(weight) ? widened(weight) : at::ones(shape, input.options().dtype(at::kFloat));
}

Tensor as_wide_as(const Tensor& gradient, const OptionalTensor& parameter) {
  if (!gradient.defined() || !is_given(parameter)) return gradient;
  return gradient.to(parameter->scalar_type());
}

Triple wide_layer_norm(const Tensor& input, std::vector<int64_t> shape,
                       const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  if (!is_narrow(input)) return at::native_layer_norm(input, shape, weight, bias, eps);
  return at::native_layer_norm(input, shape, wide_weight(weight, input, shape), widened(bias), eps);
}

Triple wide_layer_norm_backward(const Tensor& grad_out, const Tensor& input,
                                std::vector<int64_t> shape, const Tensor& mean, const Tensor& rstd,
                                const OptionalTensor& weight, const OptionalTensor& bias,
                                std::array<bool, 3> output_mask) {
  if (!is_narrow(input)) {
    return at::native_layer_norm_backward(grad_out, input, shape, mean, rstd, weight, bias,
                                          output_mask);
  }
  auto [grad_input, grad_weight, grad_bias] = at::native_layer_norm_backward(
      grad_out, input, shape, mean.to(at::kFloat), rstd.to(at::kFloat),
      wide_weight(weight, input, shape), widened(bias), output_mask);
  return {grad_input, as_wide_as(grad_weight, weight), as_wide_as(grad_bias, bias)};
}

// A copy, whatever the type.
Tensor statistics_of(const Tensor& running) {
  return running.to(running.scalar_type() == at::kDouble ? at::kDouble : at::kFloat,
                    /*non_blocking=*/false, /*copy=*/true);
}

Triple wide_batch_norm(const Tensor& input, const OptionalTensor& weight,
                       const OptionalTensor& bias, const OptionalTensor& running_mean,
                       const OptionalTensor& running_var, bool training, double momentum,
                       double eps) {
  const bool narrow = is_narrow(input);
  const OptionalTensor mean = narrow ? widened(running_mean) : running_mean;
  const OptionalTensor variance = narrow ? widened(running_var) : running_var;
  auto [output, save_mean, save_invstd] =
      at::native_batch_norm(input, narrow ? wide_weight(weight, input, {input.size(1)}) : weight,
                            narrow ? widened(bias) : bias, mean, variance, training, momentum, eps);
  if (!training && is_given(mean) && is_given(variance)) {
    save_mean = statistics_of(*mean);
    save_invstd = at::rsqrt(statistics_of(*variance) + eps);
  } else if (narrow && is_given(mean) && is_given(variance)) {
    if (!mean->is_same(*running_mean)) running_mean->copy_(*mean);
    if (!variance->is_same(*running_var)) running_var->copy_(*variance);
  }
  return {output, save_mean, save_invstd};
}

Triple wide_batch_norm_backward(const Tensor& grad_out, const Tensor& input,
                                const OptionalTensor& weight, const OptionalTensor& running_mean,
                                const OptionalTensor& running_var, const OptionalTensor& save_mean,
                                const OptionalTensor& save_invstd, bool train, double eps,
                                std::array<bool, 3> output_mask) {
  if (!is_narrow(input)) {
    return at::native_batch_norm_backward(grad_out, input, weight, running_mean, running_var,
                                          save_mean, save_invstd, train, eps, output_mask);
  }
  auto [grad_input, grad_weight, grad_bias] = at::native_batch_norm_backward(
      grad_out, input, wide_weight(weight, input, {input.size(1)}), widened(running_mean),
      widened(running_var), widened(save_mean), widened(save_invstd), train, eps, output_mask);
  return {grad_input, as_wide_as(grad_weight, weight), as_wide_as(grad_bias, weight)};
}

}  // namespace

void add_statistics_kernels(KernelTable& table) {
  add_kernel<&wide_layer_norm>(table, "aten::native_layer_norm");
  add_kernel<&wide_layer_norm_backward>(table, "aten::native_layer_norm_backward");
  add_kernel<&wide_batch_norm>(table, "aten::native_batch_norm");
  add_kernel<&wide_batch_norm_backward>(table, "aten::native_batch_norm_backward");
}

}  // namespace spillover::emulator
