// The fused LSTM and GRU cells, which CUDA's recurrent layers use without cuDNN.
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/zeros_like.h>

#include <tuple>

#include "emulator/aten/own_kernels.hpp"

namespace spillover::emulator {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Tensor with_bias(const Tensor& gates, const OptionalTensor& bias) {
  return is_given(bias) ? gates + *bias : gates;
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell(const Tensor& input_gates, const Tensor& hidden_gates,
                                             const Tensor& cx, const OptionalTensor& input_bias,
                                             const OptionalTensor& hidden_bias) {
  const Tensor gates = with_bias(input_gates, input_bias) + with_bias(hidden_gates, hidden_bias);
  const std::vector<Tensor> parts = gates.chunk(4, 1);
  const Tensor in = at::sigmoid(parts[0]);
  const Tensor forget = at::sigmoid(parts[1]);
  const Tensor cell = at::tanh(parts[2]);
  const Tensor out = at::sigmoid(parts[3]);
  const Tensor cy = forget * cx + in * cell;
  const Tensor hy = out * at::tanh(cy);
  return {hy, cy, at::cat({in, forget, cell, out}, 1)};
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell_backward(const OptionalTensor& grad_hy,
                                                      const OptionalTensor& grad_cy,
                                                      const Tensor& cx, const Tensor& cy,
                                                      const Tensor& workspace, bool has_bias) {
  if (!is_given(grad_hy) && !is_given(grad_cy)) return {};
  const std::vector<Tensor> parts = workspace.chunk(4, 1);
  const Tensor &in = parts[0], &forget = parts[1], &cell = parts[2], &out = parts[3];
  const Tensor tanh_cy = at::tanh(cy);
  const Tensor grad_h = is_given(grad_hy) ? *grad_hy : at::zeros_like(cx);
  Tensor grad_c = grad_h * out * (1 - tanh_cy * tanh_cy);
  if (is_given(grad_cy)) grad_c = grad_c + *grad_cy;
  const Tensor grad_gates =
      at::cat({grad_c * cell * in * (1 - in), grad_c * cx * forget * (1 - forget),
               grad_c * in * (1 - cell * cell), grad_h * tanh_cy * out * (1 - out)},
              1);
  return {grad_gates, grad_c * forget, has_bias ? grad_gates.sum(0) : Tensor()};
}

// The workspace holds the reset, update and new gates, the old state, and the hidden half of the
// new gate.
std::tuple<Tensor, Tensor> gru_cell(const Tensor& input_gates, const Tensor& hidden_gates,
                                    const Tensor& hx, const OptionalTensor& input_bias,
                                    const OptionalTensor& hidden_bias) {
  const std::vector<Tensor> input = with_bias(input_gates, input_bias).chunk(3, 1);
  const std::vector<Tensor> hidden = with_bias(hidden_gates, hidden_bias).chunk(3, 1);
  const Tensor reset = at::sigmoid(input[0] + hidden[0]);
  const Tensor update = at::sigmoid(input[1] + hidden[1]);
  const Tensor fresh = at::tanh(input[2] + reset * hidden[2]);
  const Tensor hy = (hx - fresh) * update + fresh;
  return {hy, at::cat({reset, update, fresh, hx, hidden[2]}, 1)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gru_cell_backward(const Tensor& grad_hy,
                                                                     const Tensor& workspace,
                                                                     bool has_bias) {
  const std::vector<Tensor> parts = workspace.chunk(5, 1);
  const Tensor &reset = parts[0], &update = parts[1], &fresh = parts[2], &hx = parts[3];
  const Tensor& hidden_fresh = parts[4];
  const Tensor grad_update = grad_hy * (hx - fresh) * update * (1 - update);
  const Tensor grad_fresh = grad_hy * (1 - update) * (1 - fresh * fresh);
  const Tensor grad_reset = grad_fresh * hidden_fresh * reset * (1 - reset);
  const Tensor grad_input = at::cat({grad_reset, grad_update, grad_fresh}, 1);
  const Tensor grad_hidden = at::cat({grad_reset, grad_update, grad_fresh * reset}, 1);
  return {grad_input, grad_hidden, grad_hy * update, has_bias ? grad_input.sum(0) : Tensor(),
          has_bias ? grad_hidden.sum(0) : Tensor()};
}

}  // namespace

void add_recurrent_kernels(KernelTable& table) {
  add_kernel<&lstm_cell>(table, "aten::_thnn_fused_lstm_cell");
  add_kernel<&lstm_cell_backward>(table, "aten::_thnn_fused_lstm_cell_backward_impl");
  add_kernel<&gru_cell>(table, "aten::_thnn_fused_gru_cell");
  add_kernel<&gru_cell_backward>(table, "aten::_thnn_fused_gru_cell_backward");
}

}  // namespace spillover::emulator
