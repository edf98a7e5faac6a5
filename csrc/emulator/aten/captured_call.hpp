// Operators on a stream that is being captured: they leave the device's memory alone and become a
// node of the graph, which runs the CPU kernel on the same bytes at each launch.
//
// Note [Captured operators]: shapes and values that the program needs at once come from running the
// kernel during the capture too, on what memory would hold if the captured work had run
// (CaptureMemory in the core). What the node keeps are CPU tensors over the addresses, which own
// nothing: as on a GPU, whoever captures keeps the memory alive, torch in the graph's pool. CPU
// tensors and other arguments are kept by value, as a GPU's launch does.
//
// Free functions; any thread may call.
#pragma once

#include <ATen/core/stack.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/macros/Macros.h>

#include <functional>

#include "emulator/aten/cost.hpp"
#include "emulator/aten/plan.hpp"
#include "emulator/core/c_api.h"

namespace spillover::emulator {

// Runs the CPU kernel on a stack of CPU tensors.
using HostCall = std::function<void(torch::jit::Stack*)>;

// Costs one predictable branch where nothing is being captured.
inline bool is_capturing(const c10::cuda::CUDAStream& stream) {
  if (C10_LIKELY(__atomic_load_n(&spillover_emulator_captures, __ATOMIC_RELAXED) == 0))
    return false;
  return spillover_emulator_is_capturing(stream.stream()) != 0;
}

// Makes a node of a call whose arguments are on top of the stack, and puts its results there.
// Throws c10::AcceleratorError where CUDA would: for operators that wait for the device, and in a
// capture that is invalid.
void capture_call(const OperatorPlan& plan, const CostRule& cost_rule, HostCall call,
                  const c10::cuda::CUDAStream& stream, torch::jit::Stack* stack);

}  // namespace spillover::emulator
