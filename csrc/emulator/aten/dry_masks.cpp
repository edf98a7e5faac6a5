#include "emulator/aten/dry_masks.hpp"

#include <ATen/ExpandUtils.h>
#include <ATen/ops/empty.h>

#include "emulator/aten/dry_values.hpp"

namespace spillover::emulator {

bool selects_by_known_mask(const OperatorPlan& plan, c10::ArrayRef<c10::IValue> arguments) {
  return plan.name == "aten::masked_select" && is_known(arguments[1].toTensor());
}

at::Tensor selected_by_mask(c10::ArrayRef<c10::IValue> arguments) {
  const at::Tensor& self = arguments[0].toTensor();
  const at::Tensor& mask = arguments[1].toTensor();
  const at::DimVector shape = at::infer_size_dimvector(self.sizes(), mask.sizes());
  const int64_t count = mask.expand(shape).sum().item<int64_t>();
  return at::empty({count}, self.options().device(c10::DeviceType::Meta));
}

std::vector<at::Tensor> places_of(const at::Tensor& mask) {
  return mask.nonzero().unbind(1);
}

}  // namespace spillover::emulator
