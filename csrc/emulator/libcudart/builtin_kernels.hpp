// CPU bodies of the few kernels of torch that are more than arithmetic on tensors. They are known
// by a part of their mangled name, because the rest of it holds a hash that changes with every
// build.
#pragma once

namespace spillover::emulator::runtime {

// Registers the body of the kernel with this mangled name with the driver, if it is one of those.
// May be called from any thread, and again for the same name.
void provide_builtin(const char* name);

}  // namespace spillover::emulator::runtime
