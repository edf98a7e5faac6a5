// How a single operation runs. Called by the scheduler alone.
#pragma once

#include "emulator/core/operation.hpp"
#include "emulator/core/stream.hpp"
#include "emulator/core/types.hpp"

namespace spillover::emulator {

class Machine;

// With Machine::mutex held: checks what the operation touches (operation.hpp, Note [Checked when it
// runs]) and performs it if it is short. True when perform_operation has to follow.
bool begin_operation(Machine& machine, const Stream& stream, Operation& operation);

// One row of a memset.
void fill_bytes(std::byte* row, const Fill& fill);

// Without the mutex: moves bytes or calls the program's code.
void perform_operation(Machine& machine, const Stream& stream, Operation& operation);

// Whether memory has the value that the operation waits for. Memory that is gone satisfies it; the
// error is reported when the operation runs.
bool value_matches(Machine& machine, const WaitValue& wait);

}  // namespace spillover::emulator
