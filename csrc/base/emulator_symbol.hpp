// Finds functions of the emulated device's C interface, which a real driver does not have: what the
// product does out of the checker's sight is told through them. Thread-safe.
#pragma once

namespace spillover {

// nullptr where there is no such function. An emulator is loaded before torch or never, and nobody
// of ours works on pinned memory before a driver is loaded, so one look is enough.
void* find_emulator_symbol(const char* name);

}  // namespace spillover
