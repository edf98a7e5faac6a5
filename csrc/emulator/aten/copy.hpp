// Tensor.copy_ where a CUDA tensor takes part. Any thread may call.
#pragma once

#include <ATen/core/Tensor.h>

namespace spillover::emulator {

// Copies between host and device, and plain copies within it, go through CUDA's own code and so
// through the emulated runtime, where they are asynchronous. Copies on the device that convert or
// permute are kernels on a GPU, and run as an operator here.
at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking);

// _foreach_copy_: the copies one after the other, since any of them may cross between host and
// device.
void foreach_copy_(at::TensorList self, at::TensorList source, bool non_blocking);

}  // namespace spillover::emulator
