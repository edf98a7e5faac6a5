// The bytes that a tensor touches, as exact contiguous runs, and the report of an operator's
// accesses to the emulator's checker. Free functions and a list that lives on one thread's stack;
// any thread may use them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/SmallVector.h>

#include "emulator/core/c_api.h"

namespace spillover::emulator {

using RangeList = c10::SmallVector<spillover_emulator_range, 8>;

// Whether the checker is on; it cannot change while the process lives.
bool hazards_enabled();

// From a tensor's first byte to its last one; 0 for one without elements, or undefined.
size_t extent_bytes(const at::Tensor& tensor);

// Appends the runs of bytes that the tensor covers. A tensor in more than 4,096 runs counts as its
// hull: that may report a hazard between interleaved tensors, but never misses one.
void append_ranges(const at::Tensor& tensor, bool is_written, RangeList& ranges);

// Waits until the stream's next operator may run: memory then holds what a GPU's kernel would see.
// Tells the checker that the operator touches these ranges.
// Throws c10::AcceleratorError where the stream takes no work, as a failed launch does, and
// c10::Error where an access is a hazard and the policy is "raise".
void begin_operator(cudaStream_t stream, const char* name, const RangeList& ranges);

// Tells it what a CPU operator touches of host memory, of which the checker looks at the pinned
// part.
void report_host_access(const char* name, const RangeList& ranges);

}  // namespace spillover::emulator
