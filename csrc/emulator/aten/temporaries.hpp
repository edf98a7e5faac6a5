// What CUDA's kernels allocate for themselves while they run, and free before the operator returns:
// cuDNN's workspaces of convolutions, flash attention's accumulators, the sorted segments of an
// embedding's gradient. On a card it comes from torch's allocator and is part of every peak, so it
// is allocated here too, in computed runs and dry runs alike. docs/dry-run.md says what is
// modelled, from which source, and what is not.
//
// A rule belongs to one operator and never changes; any thread may use it.
#pragma once

#include <c10/cuda/CUDAStream.h>
#include <c10/util/SmallVector.h>

#include "emulator/aten/cost.hpp"
#include "emulator/aten/plan.hpp"

namespace spillover::emulator {

// Blocks that live at the same time, in bytes. Where the card has no room for an optional one,
// torch takes another kernel that needs less.
struct TemporaryGroup {
  c10::SmallVector<size_t, 8> sizes_bytes;
  bool is_optional = false;
};

// One after the other.
using Temporaries = c10::SmallVector<TemporaryGroup, 2>;

class TemporaryRule {
 public:
  explicit TemporaryRule(const OperatorPlan& plan);

  // Allocates and frees what the operator needs beside its results, which are there already.
  // SPILLOVER_EMULATOR_KERNEL_WORKSPACES=0 switches it off.
  void allocate(const CostOperands& operands) const {
    if (function_ != nullptr) allocate_all(function_(operands));
  }

 private:
  static void allocate_all(const Temporaries& groups);

  Temporaries (*function_)(const CostOperands&) = nullptr;
};

}  // namespace spillover::emulator
