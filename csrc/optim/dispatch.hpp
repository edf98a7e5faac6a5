// Which instruction set the kernels use: the widest that this processor has, or what the
// environment variable SPILLOVER_OPTIM_ISA names, for tests and for the rare machine where another
// one is faster. All give the same bits. Thread-safe.
#pragma once

#include <string>
#include <vector>

namespace spillover {

struct KernelTable;

// Throws ConfigError where the variable names none that works here.
const KernelTable& kernels();

// "portable", "avx2", "avx512" or "neon": those that this processor runs, the fastest last.
std::vector<std::string> instruction_sets();

// The one in use. Setting it is for tests: calls that run meanwhile end with the one they began
// with.
std::string instruction_set();
void set_instruction_set(const std::string& name);

}  // namespace spillover
