// Names the operand of an operator that an address belongs to, for the checker's reports. Free
// functions and a scope on one thread's stack.
#pragma once

#include <ATen/core/ivalue.h>

#include <cstddef>

#include "emulator/aten/plan.hpp"

namespace spillover::emulator {

// While it lives, reports of this thread say which of these arguments their bytes are of. What it
// refers to must outlive it.
class OperandScope {
 public:
  OperandScope(const OperatorPlan& plan, const c10::IValue* arguments, size_t count);
  ~OperandScope();
  OperandScope(const OperandScope&) = delete;
  OperandScope& operator=(const OperandScope&) = delete;

 private:
  static size_t describe(const void* address, size_t size_bytes, void* scope, char* out,
                         size_t capacity);

  const OperatorPlan& plan_;
  const c10::IValue* arguments_;
  size_t count_;
};

}  // namespace spillover::emulator
