// What the walks over the pool's structures say where an equation does not hold.
#pragma once

#include <string>

#include "base/error.hpp"

namespace spillover {

[[noreturn]] inline void throw_broken(const std::string& sentence) {
  throw StateError("broken invariant of the device pool: " + sentence);
}

// For sentences that need no making: most checks hold, and a walk makes many.
inline void expect(bool condition, const char* sentence) {
  if (!condition) [[unlikely]]
    throw_broken(sentence);
}

}  // namespace spillover
