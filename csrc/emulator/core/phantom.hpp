// What copies, memsets and kernels do in a dry run (known_bytes.hpp, Note [Phantom memory]): they
// take their turn on their stream as ever, and work only on what is known.
#pragma once

#include "emulator/core/operation.hpp"
#include "emulator/core/types.hpp"

namespace spillover::emulator {

class Machine;

// Without Machine::mutex, when the operation's turn has come.
void perform_phantom(Machine& machine, const Copy& copy);
void perform_phantom(Machine& machine, const Fill& fill);

// A kernel that says what it touches runs where it reads what is known, and touches little. One
// that does not say it runs always.
void perform_phantom(Machine& machine, const Kernel& kernel);

// Whether a copy from pageable memory takes the source's bytes at the call. Otherwise nobody will
// ask for them, and the copy makes its target unknown.
bool takes_phantom_source(const Machine& machine, const Copy& copy);

}  // namespace spillover::emulator
