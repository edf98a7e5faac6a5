// Knows whether this process was forked from one that had loaded the CUDA driver.
//
// A CUDA context does not survive fork(): in the child every driver call is undefined, and any lock
// of the parent may be held for ever. So each entry asks here first, before it takes a lock.
// Thread-safe; in_forked_child() is one relaxed load.
#pragma once

namespace spillover {

// True in a child of fork() whose parent had loaded the driver through this library.
bool in_forked_child() noexcept;

// Throws StateError in such a child.
void check_not_forked();

// Called once the driver is loaded: from now on children of fork() are told apart.
void watch_forks();

}  // namespace spillover
