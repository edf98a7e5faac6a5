// Softmax of half-precision inputs into single precision (softmax(x, dtype=torch.float32)), which
// CUDA's kernels do in one go and the CPU's refuse. The widened input takes no device memory.
#include <ATen/core/Tensor.h>
#include <ATen/ops/_log_softmax.h>
#include <ATen/ops/_log_softmax_backward_data.h>
#include <ATen/ops/_softmax.h>
#include <ATen/ops/_softmax_backward_data.h>

#include "emulator/aten/own_kernels.hpp"

namespace spillover::emulator {
namespace {

using at::Tensor;

Tensor widened_where(const Tensor& input, bool half_to_float) {
  return half_to_float ? input.to(at::kFloat) : input;
}

Tensor softmax(const Tensor& input, int64_t dim, bool half_to_float) {
  return at::_softmax(widened_where(input, half_to_float), dim, false);
}

Tensor log_softmax(const Tensor& input, int64_t dim, bool half_to_float) {
  return at::_log_softmax(widened_where(input, half_to_float), dim, false);
}

Tensor softmax_backward(const Tensor& grad, const Tensor& output, int64_t dim,
                        at::ScalarType input_type) {
  return at::_softmax_backward_data(grad, output, dim, grad.scalar_type()).to(input_type);
}

Tensor log_softmax_backward(const Tensor& grad, const Tensor& output, int64_t dim,
                            at::ScalarType input_type) {
  return at::_log_softmax_backward_data(grad, output, dim, grad.scalar_type()).to(input_type);
}

}  // namespace

void add_softmax_kernels(KernelTable& table) {
  add_kernel<&softmax>(table, "aten::_softmax");
  add_kernel<&log_softmax>(table, "aten::_log_softmax");
  add_kernel<&softmax_backward>(table, "aten::_softmax_backward_data");
  add_kernel<&log_softmax_backward>(table, "aten::_log_softmax_backward_data");
}

}  // namespace spillover::emulator
