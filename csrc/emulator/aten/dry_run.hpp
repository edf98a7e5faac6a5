// Operators in a dry run (core/known_bytes.hpp, Note [Phantom memory]): shapes and strides come
// from an operator's meta kernel, its results from torch's allocator, and no bytes from anywhere.
//
// Note [Phantom kernels]. A phantom kernel stands where the CPU kernel stands in EmulatedOperator,
// and has its contract: it gets CPU tensors that alias the device's memory and returns CPU tensors.
// Inside, each alias gets a meta twin; twins share a storage where their aliases do, so that a
// result that is a view of an argument is found again. Results have no bytes, which is_phantom()
// tells. Everything before and after (the wait for the stream, the ranges that it touches, the
// allocation of results) is the code that serves computed operators.
//
// Any thread may call.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/boxing/KernelFunction.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <c10/util/FunctionRef.h>

#include <optional>

#include "emulator/aten/plan.hpp"

namespace spillover::emulator {

// Whether this process makes a dry run; it cannot change while the process lives.
bool dry_run_enabled();

// What the thread allocates from here on, workspaces included, is the operator's.
void begin_dry_operator(const OperatorPlan& plan);

// Runs the operator on the stack's CPU tensors: for real, by run_for_real, where all that it reads
// is known and all that it makes is small; otherwise as a phantom. own_kernel is the emulation's
// own, where the operator has one.
void run_dry(const OperatorPlan& plan, const std::optional<c10::KernelFunction>& own_kernel,
             const c10::OperatorHandle& op, torch::jit::Stack* stack,
             c10::function_ref<void()> run_for_real);

// A CPU operator of the program's own that reads unknown data: what it writes becomes unknown, and
// its results are host memory that nobody touches.
void run_phantom_on_host(const OperatorPlan& plan, const c10::OperatorHandle& op,
                         torch::jit::Stack* stack);

// Whether a CPU result's bytes stand for phantom ones. Where they do not, the device memory that
// they go to is known from then on. bytes is nullptr where they are in place.
bool take_arrival(const void* target, const void* bytes, size_t size_bytes);

// copy_ between CPU tensors that alias device memory; false where it has to be done for real.
// finish_real_copy follows that.
bool copy_phantom(const at::Tensor& self, const at::Tensor& source);
void finish_real_copy(const at::Tensor& self);

// The operator that this thread began last; never freed.
const char* last_dry_operator();

}  // namespace spillover::emulator
