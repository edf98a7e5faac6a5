// How long an operator takes on the card of the clock's profile, from the shapes, strides and types
// of its arguments and results alone: no bytes are looked at, so meta tensors do as well. The
// formulas are those of docs/cost-model.md.
//
// A rule belongs to one operator and never changes; any thread may use it.
#pragma once

#include <ATen/core/ivalue.h>
#include <c10/util/ArrayRef.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "emulator/aten/plan.hpp"
#include "emulator/core/clock_api.h"

namespace spillover::emulator {

struct KernelCost {
  uint64_t duration_ns = 0;
  uint64_t moved_bytes = 0;   // read and written by the operator
  uint64_t device_bytes = 0;  // moved in the device's memory; 0 where the cache holds them
  spillover_emulator_limit limit = SPILLOVER_EMULATOR_LIMIT_FIXED;
};

// What a rule looks at.
struct CostOperands {
  const OperatorPlan& plan;
  c10::ArrayRef<c10::IValue> arguments;
  c10::ArrayRef<c10::IValue> results;

  // By its name in the schema; nullptr where there is none.
  const c10::IValue* find(std::string_view name) const;
  const at::Tensor* tensor(std::string_view name) const;  // nullptr also where it is not given
};

class CostRule {
 public:
  explicit CostRule(const OperatorPlan& plan);

  KernelCost operator()(const CostOperands& operands) const { return function_(operands); }

 private:
  KernelCost (*function_)(const CostOperands&);
};

// A kernel that moves so many bytes.
KernelCost bytes_bound_cost(double bytes);

// A kernel that moves so many bytes and works for so many nanoseconds, its fixed part aside.
KernelCost kernel_cost(double work_ns, double bytes);

// The bytes that a tensor covers: dimensions of stride 0 count once.
double tensor_bytes(const at::Tensor& tensor);

// Whether the clock is on; it cannot change while the process lives.
bool clock_enabled();

// Tells the clock that the calling thread has performed the kernel. name lives for ever.
void charge_kernel(cudaStream_t stream, const char* name, const KernelCost& cost);

}  // namespace spillover::emulator
