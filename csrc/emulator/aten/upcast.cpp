// Operators that CUDA has for half-precision types and the CPU has not: computed in single
// precision, then rounded, which is what CUDA's kernels do.
#include <ATen/core/Tensor.h>
#include <ATen/core/boxing/OperatorKernel.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "emulator/aten/brain_complex.hpp"
#include "emulator/aten/own_kernels.hpp"

namespace spillover::emulator {
namespace {

using c10::ScalarType;

constexpr const char* kUpcastOperators[] = {
    "aten::_fft_c2c",
    "aten::_fft_c2c.out",
    "aten::_fft_c2r",
    "aten::_fft_c2r.out",
    "aten::_fft_r2c",
    "aten::_fft_r2c.out",
    "aten::_upsample_bicubic2d_aa",
    "aten::_upsample_bicubic2d_aa.out",
    "aten::_upsample_bicubic2d_aa_backward",
    "aten::_upsample_bicubic2d_aa_backward.grad_input",
    "aten::_upsample_bilinear2d_aa",
    "aten::_upsample_bilinear2d_aa.out",
    "aten::_upsample_bilinear2d_aa_backward",
    "aten::_upsample_bilinear2d_aa_backward.grad_input",
    "aten::avg_pool3d",
    "aten::avg_pool3d.out",
    "aten::avg_pool3d_backward",
    "aten::avg_pool3d_backward.grad_input",
    "aten::conj_physical.out",
    "aten::multi_margin_loss",
    "aten::multi_margin_loss.out",
    "aten::multi_margin_loss_backward",
    "aten::multi_margin_loss_backward.grad_input",
    "aten::multilabel_margin_loss_forward",
    "aten::multilabel_margin_loss_forward.output",
    "aten::multilabel_margin_loss_backward",
    "aten::multilabel_margin_loss_backward.grad_input",
    "aten::polygamma",
    "aten::polygamma.out",
    "aten::round.decimals",
    "aten::round.decimals_out",
    "aten::rrelu_with_noise",
    "aten::rrelu_with_noise.out",
    "aten::rrelu_with_noise_",
    "aten::rrelu_with_noise_backward",
};

std::optional<ScalarType> wide_type(ScalarType type) {
  if (type == at::kHalf || type == at::kBFloat16) return at::kFloat;
  if (type == at::kComplexHalf || type == kBrainComplex) return at::kComplexFloat;
  return std::nullopt;
}

bool is_brain(ScalarType type) {
  return type == at::kBFloat16 || type == kBrainComplex;
}

// One call: its arguments in single precision, and the way back.
class UpcastCall {
 public:
  void widen(c10::IValue& argument, bool is_written) {
    if (!argument.isTensor() || !argument.toTensor().defined()) return;
    const at::Tensor narrow = argument.toTensor();
    const std::optional<ScalarType> wide = wide_type(narrow.scalar_type());
    if (!wide) return;
    if (narrow.numel() != 0 || !is_written) brain_ = is_brain(narrow.scalar_type());
    any_ = true;
    const at::Tensor widened = narrow.to(*wide);
    if (is_written) written_.push_back({narrow, widened});
    argument = widened;
  }

  void narrow(c10::IValue& result) const {
    if (!any_ || !result.isTensor() || !result.toTensor().defined()) return;
    const at::Tensor wide = result.toTensor().resolve_conj();
    for (const Written& written : written_) {
      if (!written.wide.is_same(result.toTensor())) continue;
      written.narrow.resize_(wide.sizes());
      written.narrow.copy_(wide);
      result = written.narrow;
      return;
    }
    if (wide.scalar_type() == at::kFloat) {
      result = wide.to(brain_ ? at::kBFloat16 : at::kHalf);
    } else if (wide.scalar_type() == at::kComplexFloat) {
      result = wide.to(brain_ ? kBrainComplex : at::kComplexHalf);
    }
  }

  // Arguments that are written but not returned, as rrelu's noise.
  void commit() const {
    for (const Written& written : written_) {
      if (written.narrow.sizes() == written.wide.sizes()) written.narrow.copy_(written.wide);
    }
  }

 private:
  struct Written {
    at::Tensor narrow;
    at::Tensor wide;
  };

  std::vector<Written> written_;
  bool brain_ = false;
  bool any_ = false;
};

class UpcastKernel final : public c10::OperatorKernel {
 public:
  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                  torch::jit::Stack* stack) const {
    const auto& arguments = op.schema().arguments();
    const size_t first = stack->size() - arguments.size();
    UpcastCall call;
    for (size_t i = 0; i < arguments.size(); ++i) {
      const c10::AliasInfo* info = arguments[i].alias_info();
      call.widen((*stack)[first + i], info != nullptr && info->isWrite());
    }
    op.redispatchBoxed(keys, stack);
    for (size_t i = first; i < stack->size(); ++i) call.narrow((*stack)[i]);
    call.commit();
  }
};

}  // namespace

void add_upcast_kernels(KernelTable& table) {
  for (const char* name : kUpcastOperators) {
    table.insert_or_assign(
        name, c10::KernelFunction::makeFromBoxedFunctor(std::make_unique<UpcastKernel>()));
  }
}

}  // namespace spillover::emulator
