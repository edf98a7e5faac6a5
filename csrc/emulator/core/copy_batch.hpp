// Copies of one call that CUDA may run in any order, or at once: two of them that touch the same
// bytes are a hazard where one writes, though both are on one stream.
//
// Called with Machine::mutex held.
#pragma once

#include <vector>

#include "emulator/core/machine.hpp"
#include "emulator/core/operation.hpp"

namespace spillover::emulator {

// Reports the first two copies of a batch that depend on each other. True when there are any.
bool check_independent(Machine& machine, const Stream& stream, const char* name,
                       const std::vector<Copy>& copies);

}  // namespace spillover::emulator
