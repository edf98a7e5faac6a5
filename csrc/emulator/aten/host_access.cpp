#include "emulator/aten/host_access.hpp"

#include "emulator/aten/accesses.hpp"
#include "emulator/aten/dry_run.hpp"
#include "emulator/aten/dry_values.hpp"
#include "emulator/aten/operands.hpp"
#include "emulator/aten/operator_kernel.hpp"
#include "emulator/core/c_api.h"
#include "emulator/core/clock_api.h"
#include "emulator/core/dry_api.h"

namespace spillover::emulator {
namespace {

// While a thread is inside of an operator that the clock is told of.
class ChargedScope {
 public:
  ChargedScope() { ++depth_; }
  ~ChargedScope() { --depth_; }
  ChargedScope(const ChargedScope&) = delete;
  ChargedScope& operator=(const ChargedScope&) = delete;

  static bool is_active() { return depth_ != 0; }

 private:
  [[gnu::tls_model("initial-exec")]] static inline thread_local int depth_ = 0;
};

// Collects one tensor; false where the operator is not a CPU operator after all.
bool collect(const at::Tensor& tensor, bool is_written, RangeList& ranges) {
  if (!tensor.defined()) return true;
  if (tensor.is_cuda()) return false;
  if (tensor.is_cpu() && tensor.layout() == at::kStrided) append_ranges(tensor, is_written, ranges);
  return true;
}

}  // namespace

WatchedOperator::WatchedOperator(OperatorPlan plan)
    : plan_(std::move(plan)),
      cost_rule_(plan_),
      is_optimizer_(plan_.name.starts_with("aten::_fused_ada") ||
                    plan_.name.starts_with("aten::_fused_sgd")),
      is_zero_(plan_.name == "aten::zero_") {}

void WatchedOperator::report(const c10::IValue* arguments) const {
  RangeList ranges;
  for (size_t i = 0; i < plan_.arguments.size(); ++i) {
    const c10::IValue& value = arguments[i];
    const bool is_written = plan_.arguments[i].is_written;
    if (value.isTensor()) {
      if (!collect(value.toTensor(), is_written, ranges)) return;
    } else if (plan_.arguments[i].kind == ArgumentKind::kTensorList && value.isList()) {
      for (const c10::IValue& element : value.toListRef()) {
        if (element.isTensor() && !collect(element.toTensor(), is_written, ranges)) return;
      }
    }
  }
  const OperandScope operands(plan_, arguments, plan_.arguments.size());
  report_host_access(plan_.name.c_str(), ranges);
}

bool WatchedOperator::is_on_host(c10::ArrayRef<c10::IValue> arguments) const {
  bool found = false;
  const auto is_host = [&](const c10::IValue& value) {
    if (!value.isTensor() || !value.toTensor().defined()) return true;
    found = true;
    return value.toTensor().is_cpu() && value.toTensor().layout() == at::kStrided;
  };
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (plan_.arguments[i].kind == ArgumentKind::kTensorList && arguments[i].isList()) {
      for (const c10::IValue& element : arguments[i].toListRef()) {
        if (!is_host(element)) return false;
      }
    } else if (!is_host(arguments[i])) {
      return false;
    }
  }
  return found;
}

// Tells the clock what the operator moved. What it is made of is a part of it.
void WatchedOperator::run_charged(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                                  torch::jit::Stack* stack) const {
  const size_t first = stack->size() - plan_.arguments.size();
  const c10::SmallVector<c10::IValue, 8> arguments(stack->begin() + static_cast<ptrdiff_t>(first),
                                                   stack->end());
  if (!is_on_host(arguments)) return run(op, keys, stack);
  {
    const ChargedScope charged;
    run(op, keys, stack);
  }
  const c10::ArrayRef<c10::IValue> results(stack->data() + first, stack->size() - first);
  const KernelCost cost = cost_rule_({plan_, arguments, results});
  spillover_emulator_host_operator(plan_.name.c_str(), cost.moved_bytes, is_optimizer_ ? 1 : 0);
}

void WatchedOperator::operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                                 torch::jit::Stack* stack) const {
  if (clock_enabled() && !DeviceWorkScope::is_active() && !ChargedScope::is_active()) {
    run_charged(op, keys, stack);
  } else {
    run(op, keys, stack);
  }
}

void WatchedOperator::run(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                          torch::jit::Stack* stack) const {
  if (!DeviceWorkScope::is_active() && spillover_emulator_pinned_count() != 0) {
    report(stack->data() + (stack->size() - plan_.arguments.size()));
  }
  constexpr auto kBelow =
      c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, c10::DispatchKey::BackendSelect);
  if (is_zero_ && dry_run_enabled() && zero_without_memory(stack->back().toTensor())) {
    return set_known(stack->back().toTensor(), true);
  }
  const bool may_be_unknown =
      dry_run_enabled() && !DeviceWorkScope::is_active() &&
      (spillover_emulator_unknown_host_runs() != 0 || spillover_emulator_pinned_count() != 0);
  if (C10_LIKELY(!may_be_unknown)) return op.redispatchBoxed(keys & kBelow, stack);
  WrittenTensors written;
  if (run_host_operator(plan_, op, stack, written)) return;
  op.redispatchBoxed(keys & kBelow, stack);
  finish_host_operator(written);
}

}  // namespace spillover::emulator
