// Calls of the pool's C interface that throw what torch turns into RuntimeError.
#pragma once

#include "allocator/c_api.h"

namespace spillover::plain_adapter {

// Throws std::runtime_error with the operation and the pool's last error.
[[noreturn]] void fail(const char* operation);

inline void require(spillover_status status, const char* operation) {
  if (status != SPILLOVER_OK) fail(operation);
}

}  // namespace spillover::plain_adapter
