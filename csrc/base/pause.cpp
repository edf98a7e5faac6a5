#include "base/pause.hpp"

#include <cstdint>
#include <thread>

#include "base/emulator_symbol.hpp"

namespace spillover {
namespace {

using EnabledFunction = int (*)();
using AdvanceFunction = void (*)(int64_t);

// Null where time is the machine's.
AdvanceFunction find_advance() {
  const auto enabled =
      reinterpret_cast<EnabledFunction>(find_emulator_symbol("spillover_emulator_clock_enabled"));
  if (enabled == nullptr || enabled() == 0) return nullptr;
  return reinterpret_cast<AdvanceFunction>(find_emulator_symbol("spillover_emulator_advance"));
}

}  // namespace

void pause_for(std::chrono::nanoseconds duration) noexcept {
  static const AdvanceFunction advance = find_advance();
  if (advance != nullptr) {
    advance(duration.count());
  } else {
    std::this_thread::sleep_for(duration);
  }
}

}  // namespace spillover
