// The emulation's own rules for shapes of operators in a dry run (dry_run.hpp), where torch's meta
// kernels have none or give others than the device. Any thread may call.
#pragma once

#include <string>

#include "emulator/aten/own_kernels.hpp"

namespace spillover::emulator {

// By full name, "aten::mm.dtype"; nullptr where torch's meta kernel is right. Called with meta
// tensors and the keys of the meta backend.
const c10::KernelFunction* find_phantom_kernel(const std::string& name);

}  // namespace spillover::emulator
