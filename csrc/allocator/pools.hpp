// The pools of the process: one a device, made at first use.
//
// They are leaked on purpose: a static destructor would call a driver that has shut down, and
// blocks may be freed until the very end. Thread-safe. In a forked child every function throws
// StateError before it takes a lock, as the parent's locks may be held for ever.
#pragma once

#include "allocator/pool.hpp"

namespace spillover {

// Throws ConfigError for a device that does not exist, DriverError without a driver.
Pool& pool_of_device(int device);

// The same where it was made before; null otherwise, and in a forked child.
Pool* existing_pool(int device) noexcept;

// The pool that an address belongs to; null where there is none.
Pool* find_pool(const void* pointer);

// The same, and ConfigError where there is none.
Pool& pool_of_address(const void* pointer);

}  // namespace spillover
