// Tells a process from the children that were forked from it.
//
// In a forked child only the forking thread goes on: a mutex that another one held stays locked for
// ever. What a process has made may ask, before it takes its lock, whether that process is this
// one. Thread-safe; costs a relaxed load.
#pragma once

#include <cstdint>

namespace spillover {

// Of this process: another number than its parent's and than those before, as far as children are
// made by fork() after the first call.
uint32_t fork_generation() noexcept;

}  // namespace spillover
