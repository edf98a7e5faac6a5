// SPILLOVER_CHECK stops the process when an invariant of ours is broken: going on would corrupt a
// training run in silence. It stays on in release builds, so its condition must be O(1).
#pragma once

namespace spillover {

[[noreturn]] void check_failed(const char* condition, const char* file, int line,
                               const char* explanation) noexcept;

}  // namespace spillover

#define SPILLOVER_CHECK(condition, explanation)                               \
  do {                                                                        \
    if (!(condition)) [[unlikely]]                                            \
      ::spillover::check_failed(#condition, __FILE__, __LINE__, explanation); \
  } while (false)
