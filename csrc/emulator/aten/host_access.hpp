// CPU operators seen by the checker and the clock: what a program does to pinned memory, and how
// much memory of the host it moves, with ordinary CPU tensors.
//
// Note [Watching CPU operators]. The wrapper stands at key BackendSelect, which every thread's
// dispatcher visits right above the backends, and then hands on to the operator's own kernel. A
// RecordFunction callback sees the same calls, but torch catches whatever it throws, so the policy
// "raise" could not stop the program at the faulty line. The operators that already use
// BackendSelect are factories, which touch no existing memory.
#pragma once

#include <ATen/core/boxing/OperatorKernel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include "emulator/aten/cost.hpp"
#include "emulator/aten/plan.hpp"

namespace spillover::emulator {

// One object an operator, owned by the dispatcher, constant after construction; any thread may call
// it.
class WatchedOperator final : public c10::OperatorKernel {
 public:
  explicit WatchedOperator(OperatorPlan plan);

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                  torch::jit::Stack* stack) const;

 private:
  void run(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) const;
  void run_charged(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                   torch::jit::Stack* stack) const;
  void report(const c10::IValue* arguments) const;
  bool is_on_host(c10::ArrayRef<c10::IValue> arguments) const;

  OperatorPlan plan_;
  CostRule cost_rule_;
  bool is_optimizer_;
  bool is_zero_;
};

}  // namespace spillover::emulator
