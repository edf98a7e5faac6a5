#include "emulator/aten/host_access.hpp"

#include "emulator/aten/accesses.hpp"
#include "emulator/aten/dry_run.hpp"
#include "emulator/aten/dry_values.hpp"
#include "emulator/aten/operands.hpp"
#include "emulator/aten/operator_kernel.hpp"
#include "emulator/core/c_api.h"
#include "emulator/core/dry_api.h"

namespace spillover::emulator {
namespace {

// Collects one tensor; false where the operator is not a CPU operator after all.
bool collect(const at::Tensor& tensor, bool is_written, RangeList& ranges) {
  if (!tensor.defined()) return true;
  if (tensor.is_cuda()) return false;
  if (tensor.is_cpu() && tensor.layout() == at::kStrided) append_ranges(tensor, is_written, ranges);
  return true;
}

}  // namespace

WatchedOperator::WatchedOperator(OperatorPlan plan) : plan_(std::move(plan)) {}

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

void WatchedOperator::operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                                 torch::jit::Stack* stack) const {
  if (!DeviceWorkScope::is_active() && spillover_emulator_pinned_count() != 0) {
    report(stack->data() + (stack->size() - plan_.arguments.size()));
  }
  constexpr auto kBelow =
      c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, c10::DispatchKey::BackendSelect);
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
