#include "base/annotated_mutex.hpp"

#include <cstdint>

#include "base/emulator_symbol.hpp"

namespace spillover {
namespace {

using TokenFunction = void (*)(uint64_t token);

struct Checker {
  TokenFunction acquire =
      reinterpret_cast<TokenFunction>(find_emulator_symbol("spillover_emulator_acquire"));
  TokenFunction release =
      reinterpret_cast<TokenFunction>(find_emulator_symbol("spillover_emulator_release"));
};

const Checker& checker() {
  static const Checker instance;
  return instance;
}

}  // namespace

void AnnotatedMutex::acquired() noexcept {
  if (checker().acquire != nullptr) checker().acquire(reinterpret_cast<uint64_t>(this));
}

void AnnotatedMutex::about_to_release() noexcept {
  if (checker().release != nullptr) checker().release(reinterpret_cast<uint64_t>(this));
}

}  // namespace spillover
