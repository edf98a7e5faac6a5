// A pause between two looks at something that another thread or the device changes. Thread-safe.
#pragma once

#include <chrono>

namespace spillover {

// Sleeps. Where the emulated device keeps virtual time, the thread's time goes on by as much
// instead: the device works in that time, and nothing is gained by waiting for the machine's.
void pause_for(std::chrono::nanoseconds duration) noexcept;

}  // namespace spillover
