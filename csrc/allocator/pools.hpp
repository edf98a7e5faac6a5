// The pools of the process: one a device, made at first use.
//
// They are leaked on purpose: a static destructor would call a driver that has shut down, and
// blocks may be freed until the very end. Thread-safe. In a forked child every function throws
// StateError before it takes a lock, as the parent's locks may be held for ever.
#pragma once

#include <string_view>

#include "allocator/pool.hpp"

namespace spillover {

// Throws ConfigError for a device that does not exist or settings in SPILLOVER_ALLOCATOR that are
// not understood, DriverError without a driver.
Pool& pool_of_device(int device);

// The same where it was made before; null otherwise, and in a forked child.
Pool* existing_pool(int device) noexcept;

// The same for functions that need no pool: one that is not made holds nothing, and its context
// alone would take hundreds of MiB of a device that the process may not use at all. Throws
// ConfigError for a device that does not exist.
Pool* pool_if_made(int device);

// Changes settings by a text, all of it or nothing: of one device's pool, which is made with them
// where there is none, or of every pool, those too that are made later. source is where the text
// comes from, for messages. Throws ConfigError, StateError for what cannot change any more, and
// DriverError where memory above a new limit could not be given back.
void configure_pool(int device, std::string_view settings, std::string_view source);
void configure_pools(std::string_view settings, std::string_view source);

// Throws ConfigError outside 0 to 1.
void set_memory_fraction(int device, double fraction);

// The pool that an address belongs to; null where there is none.
Pool* find_pool(const void* pointer);

// The same, and ConfigError where there is none.
Pool& pool_of_address(const void* pointer);

}  // namespace spillover
