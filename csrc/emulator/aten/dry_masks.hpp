// Selection by a mask in a dry run: where the mask is known, so is how much it selects, whatever it
// selects from. Any thread may call.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/stack.h>

#include <vector>

#include "emulator/aten/plan.hpp"

namespace spillover::emulator {

// masked_select with a mask that is known; its arguments are CPU tensors.
bool selects_by_known_mask(const OperatorPlan& plan, c10::ArrayRef<c10::IValue> arguments);

// A meta tensor of the size that masked_select's result has.
at::Tensor selected_by_mask(c10::ArrayRef<c10::IValue> arguments);

// The places that a known mask selects, one index tensor a dimension of it.
std::vector<at::Tensor> places_of(const at::Tensor& mask);

}  // namespace spillover::emulator
