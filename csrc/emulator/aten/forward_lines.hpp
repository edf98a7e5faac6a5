// Which line of the program a backward pass works for. Backward passes run on threads of torch's
// own, which have no Python frames; but autograd numbers its nodes, and the operator that makes a
// node runs on the program's thread. Any thread may call.
#pragma once

#include <torch/csrc/autograd/function.h>

namespace spillover::emulator {

// From here on the site (core/dry_api.h) of each operator that autograd may record is kept, under
// the number of the node that it would make. For dry runs: about a fifth of a microsecond an
// operator.
void follow_forward_lines();

// The site of the operator that made the node; 0 where it is not known (any more).
unsigned forward_site(const torch::autograd::Node& node);

}  // namespace spillover::emulator
