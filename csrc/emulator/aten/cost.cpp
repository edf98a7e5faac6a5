#include "emulator/aten/cost.hpp"

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <string_view>
#include <unordered_map>

#include "emulator/aten/card.hpp"
#include "emulator/aten/cost_math.hpp"
#include "emulator/core/clock_api.h"

namespace spillover::emulator {
namespace {

using Function = KernelCost (*)(const CostOperands&);

// Bytes of a tensor, or of all tensors of a list.
double value_bytes(const c10::IValue& value) {
  if (value.isTensor()) return tensor_bytes(value.toTensor());
  if (!value.isList()) return 0;
  double total = 0;
  for (const c10::IValue& element : value.toListRef()) {
    if (element.isTensor()) total += tensor_bytes(element.toTensor());
  }
  return total;
}

bool is_output(const ArgumentPlan& argument) {
  return argument.is_written && argument.name.starts_with("out");
}

// New results; those that are arguments handed back have been counted.
double result_bytes(const CostOperands& operands) {
  double total = 0;
  for (size_t i = 0; i < operands.results.size(); ++i) {
    const auto& returned = operands.plan.returned_arguments;
    if (i < returned.size() && returned[i] >= 0) continue;
    total += value_bytes(operands.results[i]);
  }
  return total;
}

// Each input once, each output once, what is updated in place twice.
KernelCost moves_everything(const CostOperands& operands) {
  double total = result_bytes(operands);
  for (size_t i = 0; i < operands.plan.arguments.size(); ++i) {
    const ArgumentPlan& argument = operands.plan.arguments[i];
    const double bytes = value_bytes(operands.arguments[i]);
    total += argument.is_written && !is_output(argument) ? 2 * bytes : bytes;
  }
  return bytes_bound_cost(total);
}

// The argument is overwritten, not read.
KernelCost overwrites(const CostOperands& operands) {
  double total = result_bytes(operands);
  for (size_t i = 0; i < operands.plan.arguments.size(); ++i) {
    total += value_bytes(operands.arguments[i]);
  }
  return bytes_bound_cost(total);
}

// copy_: the target is overwritten.
KernelCost copies(const CostOperands& operands) {
  return bytes_bound_cost(value_bytes(operands.arguments[0]) + value_bytes(operands.arguments[1]));
}

// Reads what its indices name: as much as it writes.
KernelCost gathers(const CostOperands& operands) {
  double total = 2 * result_bytes(operands);
  for (size_t i = 0; i < operands.plan.arguments.size(); ++i) {
    const ArgumentPlan& argument = operands.plan.arguments[i];
    if (is_output(argument)) total += 2 * value_bytes(operands.arguments[i]);
    if (argument.name.starts_with("ind")) total += value_bytes(operands.arguments[i]);
  }
  return bytes_bound_cost(total);
}

// Updates what its indices name: reads the values and the indices, reads and writes as much of the
// target. A form that is not in place copies the target first.
KernelCost scatters(const CostOperands& operands) {
  double total = 2 * result_bytes(operands);
  double values = 0;
  for (size_t i = 1; i < operands.plan.arguments.size(); ++i) {
    const ArgumentPlan& argument = operands.plan.arguments[i];
    const double bytes = value_bytes(operands.arguments[i]);
    if (argument.name.starts_with("ind")) {
      total += bytes;
      if (values == 0) values = bytes;  // where the value is a number
    } else if (!is_output(argument)) {
      values = bytes;
    }
  }
  return bytes_bound_cost(total + 3 * values);
}

// embedding_dense_backward: zeroes the gradient, then adds every row to its place.
KernelCost embedding_backward(const CostOperands& operands) {
  const double rows = value_bytes(operands.arguments[0]);
  return bytes_bound_cost(result_bytes(operands) + 3 * rows + value_bytes(operands.arguments[1]));
}

// nll_loss_forward picks one element a row; its backward writes a gradient that is zero elsewhere.
KernelCost picks_targets(const CostOperands& operands) {
  const at::Tensor* const target = operands.tensor("target");
  return bytes_bound_cost(result_bytes(operands) +
                          (target == nullptr ? 0 : 2 * tensor_bytes(*target)));
}

// Fused optimizers declare gradients as written, which they are only when they unscale them.
KernelCost fused_optimizer(const CostOperands& operands) {
  const bool unscales = operands.tensor("grad_scale") != nullptr;
  double total = 0;
  for (size_t i = 0; i < operands.plan.arguments.size(); ++i) {
    const ArgumentPlan& argument = operands.plan.arguments[i];
    const bool is_updated = argument.is_written && (argument.name != "grads" || unscales);
    total += (is_updated ? 2 : 1) * value_bytes(operands.arguments[i]);
  }
  return bytes_bound_cost(total);
}

// A radix sort goes over its keys this many times.
KernelCost sorts(const CostOperands& operands) {
  constexpr double kPasses = 8;
  return bytes_bound_cost(kPasses * value_bytes(operands.arguments[0]) +
                          2 * result_bytes(operands));
}

const std::unordered_map<std::string_view, Function>& rules() {
  static const std::unordered_map<std::string_view, Function> table = [] {
    std::unordered_map<std::string_view, Function> found;
    for (const char* name :
         {"zero_", "fill_", "normal_", "uniform_", "bernoulli_", "random_", "exponential_",
          "geometric_", "cauchy_", "log_normal_", "_foreach_zero_", "eye", "arange", "linspace"}) {
      found.emplace(name, overwrites);
    }
    for (const char* name : {"embedding", "index", "_unsafe_index", "index_select", "gather",
                             "take", "_embedding_bag", "_embedding_bag_forward_only"}) {
      found.emplace(name, gathers);
    }
    for (const char* name :
         {"scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_",
          "index_add", "index_add_", "index_copy", "index_copy_", "index_fill", "index_fill_",
          "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put", "put_",
          "index_reduce", "index_reduce_"}) {
      found.emplace(name, scatters);
    }
    for (const char* name : {"_fused_adam_", "_fused_adamw_", "_fused_sgd_", "_fused_adagrad_"}) {
      found.emplace(name, fused_optimizer);
    }
    for (const char* name : {"sort", "argsort", "topk", "kthvalue", "median", "nanmedian",
                             "_unique2", "_unique", "unique_dim", "unique_consecutive", "mode"}) {
      found.emplace(name, sorts);
    }
    for (const char* name :
         {"nll_loss_forward", "nll_loss_backward", "nll_loss2d_forward", "nll_loss2d_backward"}) {
      found.emplace(name, picks_targets);
    }
    found.emplace("copy_", copies);
    found.emplace("embedding_dense_backward", embedding_backward);
    add_math_rules(found);
    return found;
  }();
  return table;
}

// "mm" of "aten::mm.out".
std::string_view base_name(std::string_view name) {
  const size_t colons = name.rfind("::");
  if (colons != std::string_view::npos) name.remove_prefix(colons + 2);
  return name.substr(0, name.find('.'));
}

}  // namespace

const c10::IValue* CostOperands::find(std::string_view name) const {
  for (size_t i = 0; i < plan.arguments.size() && i < arguments.size(); ++i) {
    if (plan.arguments[i].name == name) return &arguments[i];
  }
  return nullptr;
}

const at::Tensor* CostOperands::tensor(std::string_view name) const {
  const c10::IValue* const value = find(name);
  return value != nullptr && value->isTensor() && value->toTensor().defined() ? &value->toTensor()
                                                                              : nullptr;
}

CostRule::CostRule(const OperatorPlan& plan) : function_(moves_everything) {
  const auto found = rules().find(base_name(plan.name));
  if (found != rules().end()) function_ = found->second;
}

double tensor_bytes(const at::Tensor& tensor) {
  if (!tensor.defined() || tensor.layout() != at::kStrided) return 0;
  double count = static_cast<double>(tensor.element_size());
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) == 0) return 0;
    if (tensor.stride(i) != 0) count *= static_cast<double>(tensor.size(i));
  }
  return count;
}

KernelCost bytes_bound_cost(double bytes) {
  return kernel_cost(bytes / Card::instance().rate(bytes), bytes);
}

KernelCost kernel_cost(double work_ns, double bytes) {
  const Card& card = Card::instance();
  KernelCost cost;
  cost.duration_ns = static_cast<uint64_t>(std::ceil(card.ramp_ns + work_ns));
  cost.moved_bytes = static_cast<uint64_t>(bytes);
  if (!card.fits_cache(bytes)) cost.device_bytes = static_cast<uint64_t>(bytes);
  if (work_ns > card.ramp_ns) {
    cost.limit = work_ns > bytes / card.rate(bytes) ? SPILLOVER_EMULATOR_LIMIT_MATH
                                                    : SPILLOVER_EMULATOR_LIMIT_MEMORY;
  }
  return cost;
}

bool clock_enabled() {
  static const bool enabled = spillover_emulator_clock_enabled() != 0;
  return enabled;
}

void charge_kernel(cudaStream_t stream, const char* name, const KernelCost& cost) {
  spillover_emulator_kernel(stream, name, cost.duration_ns, cost.device_bytes, cost.limit);
}

}  // namespace spillover::emulator
