// The stated routing of mixtures of experts in a dry run.
//
// Note [Routing model]. A router chooses experts by scores that a dry run does not know. With a
// routing model its choice is made up: topk over the last dimension of unknown scores, of at most
// kExpertsMax entries, returns indices that the model says. Its values stay unknown. All that
// follows from the choice (masks, counts, places, offsets, the loop over the experts that are hit)
// is integer data, and is computed for real: known_bytes_max() is larger for it. So there is one
// assumption and no rule for each operator that routes, and sizes agree with each other.
//
// Any thread may call.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/stack.h>

#include <optional>

#include "emulator/aten/plan.hpp"

namespace spillover::emulator {

// The indices that topk returns, as a CPU tensor; nothing where the call is no router's, or the
// program's user stated no model. The arguments are CPU tensors.
std::optional<at::Tensor> routed_experts(const OperatorPlan& plan,
                                         c10::ArrayRef<c10::IValue> arguments);

// Which experts each of so many tokens goes to: a (tokens, chosen) tensor of int64. Every expert
// gets the same number of tokens but for one, the first, which gets imbalance times the mean,
// evenly spread over the tokens. A token's experts differ from each other.
at::Tensor assign_experts(int64_t tokens, int64_t chosen, int64_t experts, double imbalance);

}  // namespace spillover::emulator
