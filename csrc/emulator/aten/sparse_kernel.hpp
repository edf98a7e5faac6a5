// The kernel that is registered for sparse operators whose CUDA code launches kernels of its own:
// runs the CPU's sparse kernel on the device's bytes. Sparse operators that only handle metadata,
// or are made of dense operators, keep torch's code. One object an operator and key, owned by the
// dispatcher, constant after construction; any thread may call it.
#pragma once

#include <ATen/core/boxing/OperatorKernel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <string_view>

#include "emulator/aten/plan.hpp"

namespace spillover::emulator {

class EmulatedSparseOperator final : public c10::OperatorKernel {
 public:
  // host_key is the CPU's counterpart of the key that the kernel is registered at.
  EmulatedSparseOperator(OperatorPlan plan, c10::DispatchKey host_key);

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                  torch::jit::Stack* stack) const;

 private:
  OperatorPlan plan_;
  c10::DispatchKey host_key_;
};

// Whether the operator's CUDA kernel for sparse tensors launches something, so that the emulation
// must stand in. By base name, "aten::mm".
bool launches_sparse_kernels(std::string_view base_name);

}  // namespace spillover::emulator
