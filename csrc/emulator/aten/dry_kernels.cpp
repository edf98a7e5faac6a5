// Shapes of operators whose meta kernel gives other ones than the emulated device's kernel, or that
// have none. They take and give meta tensors.
#include <ATen/core/Tensor.h>
#include <ATen/core/boxing/OperatorKernel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/WrapDimMinimal.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "emulator/aten/dry_kernels.hpp"

namespace spillover::emulator {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

at::MemoryFormat format_of(const Tensor& input, const Tensor& weight) {
  const at::MemoryFormat wanted = input.suggest_memory_format();
  return wanted == at::MemoryFormat::Contiguous ? weight.suggest_memory_format() : wanted;
}

Tensor with_format(const Tensor& tensor, at::MemoryFormat format) {
  if (!tensor.defined()) return tensor;
  const bool fits = format == at::MemoryFormat::ChannelsLast     ? tensor.dim() == 4
                    : format == at::MemoryFormat::ChannelsLast3d ? tensor.dim() == 5
                                                                 : true;
  if (!fits) return tensor;
  return at::empty(tensor.sizes(), tensor.options().memory_format(format));
}

// Torch's meta kernel looks at formats for CUDA's own devices only.
class ConvolutionKernel final : public c10::OperatorKernel {
 public:
  explicit ConvolutionKernel(bool is_backward) : is_backward_(is_backward) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                  torch::jit::Stack* stack) const {
    const size_t first = stack->size() - op.schema().arguments().size();
    const Tensor input = (*stack)[first + (is_backward_ ? 1 : 0)].toTensor();
    const Tensor weight = (*stack)[first + (is_backward_ ? 2 : 1)].toTensor();
    const at::MemoryFormat format = format_of(input, weight);
    op.redispatchBoxed(keys, stack);
    const size_t formatted = is_backward_ ? 2 : 1;  // the gradients of the input and the weight
    for (size_t i = first; i < first + formatted; ++i) {
      if ((*stack)[i].isTensor()) (*stack)[i] = with_format((*stack)[i].toTensor(), format);
    }
  }

 private:
  const bool is_backward_;
};

std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& input,
                                              std::vector<int64_t> normalized_shape,
                                              const OptionalTensor& /*weight*/,
                                              const OptionalTensor& /*bias*/, double /*eps*/) {
  std::vector<int64_t> outer = input.sizes().vec();
  std::fill(outer.end() - static_cast<ptrdiff_t>(normalized_shape.size()), outer.end(), 1);
  const auto options =
      input.options().dtype(input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  return {at::empty_like(input, at::MemoryFormat::Contiguous), at::empty(outer, options),
          at::empty(outer, options)};
}

std::tuple<Tensor, Tensor> weight_norm(const Tensor& v, const Tensor& g, int64_t /*dim*/) {
  const auto type = g.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return {at::empty_like(v, at::MemoryFormat::Contiguous),
          at::empty_strided(g.sizes(), g.strides(), g.options().dtype(type))};
}

// Statistics of groups are as wide as the parameters: narrow inputs with wide parameters have wide
// ones.
at::ScalarType statistics_type(const Tensor& input, const OptionalTensor& weight,
                               const OptionalTensor& bias) {
  if (is_given(weight)) return weight->scalar_type();
  return is_given(bias) ? bias->scalar_type() : input.scalar_type();
}

std::tuple<Tensor, Tensor, Tensor> group_norm(const Tensor& input, const OptionalTensor& weight,
                                              const OptionalTensor& bias, int64_t batch,
                                              int64_t /*channels*/, int64_t /*area*/,
                                              int64_t groups, double /*eps*/) {
  const auto options = input.options().dtype(statistics_type(input, weight, bias));
  return {at::empty_like(input, input.suggest_memory_format()), at::empty({batch, groups}, options),
          at::empty({batch, groups}, options)};
}

std::tuple<Tensor, Tensor> ctc_loss(const Tensor& log_probs, const Tensor& /*targets*/,
                                    std::vector<int64_t> input_lengths,
                                    std::vector<int64_t> target_lengths, int64_t /*blank*/,
                                    bool /*zero_infinity*/) {
  TORCH_CHECK(input_lengths.size() == target_lengths.size(),
              "input_lengths and target_lengths must have one length for each sequence");
  int64_t longest = 0;
  for (const int64_t length : target_lengths) longest = std::max(longest, length);
  const int64_t batch = log_probs.size(1);
  return {at::empty({batch}, log_probs.options()),
          at::empty({batch, log_probs.size(0), 2 * longest + 1}, log_probs.options())};
}

Tensor ctc_loss_backward(const Tensor& /*grad*/, const Tensor& log_probs, const Tensor& /*targets*/,
                         std::vector<int64_t> /*input_lengths*/,
                         std::vector<int64_t> /*target_lengths*/, const Tensor& /*loss*/,
                         const Tensor& /*log_alpha*/, int64_t /*blank*/, bool /*zero_infinity*/) {
  return at::empty_like(log_probs, at::MemoryFormat::Contiguous);
}

std::tuple<Tensor, Tensor> smallest_and_largest(const Tensor& self) {
  return {at::empty({}, self.options()), at::empty({}, self.options())};
}

std::tuple<Tensor, Tensor> smallest_and_largest_of(const Tensor& self, int64_t dim, bool keepdim) {
  std::vector<int64_t> shape = self.sizes().vec();
  if (!shape.empty()) {
    const auto place = shape.begin() + c10::maybe_wrap_dim(dim, self.dim());
    if (keepdim) {
      *place = 1;
    } else {
      shape.erase(place);
    }
  }
  return {at::empty(shape, self.options()), at::empty(shape, self.options())};
}

// Only called where the program gives the size.
Tensor repeated_places(const Tensor& repeats, std::optional<int64_t> output_size) {
  return at::empty({output_size.value()}, repeats.options().dtype(at::kLong));
}

// Operators whose results have the shapes and types of arguments.
struct LikeArguments {
  const char* name;
  std::initializer_list<size_t> arguments;  // one a result
  bool has_mask = false;                    // the last result is one of booleans
};

const LikeArguments kLikeArguments[] = {
    {"aten::_dirichlet_grad", {0}},
    {"aten::_logcumsumexp", {0}},
    {"aten::_masked_softmax", {0}},
    {"aten::_masked_softmax_backward", {0}},
    {"aten::_sample_dirichlet", {0}},
    {"aten::_standard_gamma_grad", {0}},
    {"aten::binomial", {0}},
    {"aten::fractional_max_pool3d_backward", {1}},
    {"aten::glu_backward_jvp", {0}},
    {"aten::glu_jvp", {0}},
    {"aten::multi_margin_loss_backward", {1}},
    {"aten::multilabel_margin_loss_backward", {1}},
    {"aten::_fake_quantize_learnable_per_channel_affine", {0}},
    {"aten::_fake_quantize_learnable_per_channel_affine_backward", {1, 2, 3}},
    {"aten::_fake_quantize_learnable_per_tensor_affine", {0}},
    {"aten::_fake_quantize_learnable_per_tensor_affine_backward", {1, 2, 3}},
    {"aten::_fake_quantize_per_tensor_affine_cachemask_tensor_qparams", {0, 0}, true},
    {"aten::fake_quantize_per_channel_affine_cachemask", {0, 0}, true},
    {"aten::fake_quantize_per_tensor_affine_cachemask", {0, 0}, true},
};

class LikeArgumentsKernel final : public c10::OperatorKernel {
 public:
  explicit LikeArgumentsKernel(const LikeArguments& rule) : rule_(rule) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet,
                  torch::jit::Stack* stack) const {
    const size_t first = stack->size() - op.schema().arguments().size();
    std::vector<Tensor> results;
    for (const size_t index : rule_.arguments) {
      const Tensor& argument = (*stack)[first + index].toTensor();
      const bool is_mask = rule_.has_mask && results.size() + 1 == rule_.arguments.size();
      const auto type = is_mask ? at::kBool : argument.scalar_type();
      results.push_back(at::empty_like(argument, argument.options().dtype(type)));
    }
    torch::jit::drop(*stack, op.schema().arguments().size());
    for (Tensor& result : results) stack->emplace_back(std::move(result));
  }

 private:
  const LikeArguments& rule_;
};

// The running extreme and its place go into tensors that are there already.
void cumulative_extreme(const Tensor& /*self*/, Tensor& /*values*/, Tensor& /*indices*/,
                        int64_t /*dim*/) {}

KernelTable make_table() {
  KernelTable table;
  const auto add_convolution = [&](const char* name, bool is_backward) {
    table.insert_or_assign(name, c10::KernelFunction::makeFromBoxedFunctor(
                                     std::make_unique<ConvolutionKernel>(is_backward)));
  };
  add_convolution("aten::convolution", false);
  add_convolution("aten::_convolution", false);
  add_convolution("aten::convolution_backward", true);
  for (const LikeArguments& rule : kLikeArguments) {
    table.insert_or_assign(rule.name, c10::KernelFunction::makeFromBoxedFunctor(
                                          std::make_unique<LikeArgumentsKernel>(rule)));
  }
  add_kernel<&smallest_and_largest>(table, "aten::_aminmax");
  add_kernel<&smallest_and_largest_of>(table, "aten::_aminmax.dim");
  add_kernel<&repeated_places>(table, "aten::repeat_interleave.Tensor");
  add_kernel<&layer_norm>(table, "aten::native_layer_norm");
  add_kernel<&weight_norm>(table, "aten::_weight_norm_interface");
  add_kernel<&group_norm>(table, "aten::native_group_norm");
  add_kernel<&ctc_loss>(table, "aten::_ctc_loss");
  add_kernel<&ctc_loss_backward>(table, "aten::_ctc_loss_backward");
  add_kernel<&cumulative_extreme>(table, "aten::_cummax_helper");
  add_kernel<&cumulative_extreme>(table, "aten::_cummin_helper");
  return table;
}

}  // namespace

const c10::KernelFunction* find_phantom_kernel(const std::string& name) {
  // Never destroyed: operators run until the very end of the process.
  static auto* const table = new KernelTable(make_table());
  const auto found = table->find(name);
  return found == table->end() ? nullptr : &found->second;
}

}  // namespace spillover::emulator
