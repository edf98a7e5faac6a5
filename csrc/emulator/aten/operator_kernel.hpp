// The kernel that is registered at key CUDA for every emulated operator: it waits for what the
// stream depends on, runs the CPU kernel on CPU tensors that alias the device's bytes, maps the
// results back and reports the accesses to the checker. One object an operator, owned by the
// dispatcher, constant after construction; any thread may call it.
#pragma once

#include <ATen/core/boxing/KernelFunction.h>
#include <ATen/core/boxing/OperatorKernel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <optional>

#include "emulator/aten/cost.hpp"
#include "emulator/aten/plan.hpp"
#include "emulator/aten/temporaries.hpp"

namespace spillover::emulator {

class EmulatedOperator final : public c10::OperatorKernel {
 public:
  // With no kernel of our own, the operator's CPU kernel does the work.
  explicit EmulatedOperator(OperatorPlan plan, std::optional<c10::KernelFunction> kernel);

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                  torch::jit::Stack* stack) const;

  // On CPU tensors.
  void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) const;

 private:
  OperatorPlan plan_;
  CostRule cost_rule_;
  TemporaryRule temporary_rule_;
  std::optional<c10::KernelFunction> kernel_;
};

// Throws "operator aten::x is not emulated" with the reason.
class UnsupportedOperator final : public c10::OperatorKernel {
 public:
  explicit UnsupportedOperator(const char* reason) : reason_(reason) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                  torch::jit::Stack* stack) const;

 private:
  const char* reason_;
};

// Marks that this thread runs a CPU kernel on behalf of a stream, so that its CPU operators do not
// count as accesses by the host.
class DeviceWorkScope {
 public:
  DeviceWorkScope() { ++depth_; }
  ~DeviceWorkScope() { --depth_; }
  DeviceWorkScope(const DeviceWorkScope&) = delete;
  DeviceWorkScope& operator=(const DeviceWorkScope&) = delete;

  static bool is_active() { return depth_ != 0; }

 private:
  // In the initial TLS block: every operator comes by here.
  [[gnu::tls_model("initial-exec")]] static inline thread_local int depth_ = 0;
};

}  // namespace spillover::emulator
