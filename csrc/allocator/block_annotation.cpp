#include "allocator/block_annotation.hpp"

#include <cstdint>

#include "base/emulator_symbol.hpp"

namespace spillover {
namespace {

// The part of the emulator's C interface that is used here, declared again because the product
// shares no header with the emulator.
using FollowsFunction = int (*)();
using BeginFunction = void (*)(const void*, size_t, uint64_t);
using EndFunction = void (*)(const void*, size_t);

struct Checker {
  FollowsFunction follows =
      reinterpret_cast<FollowsFunction>(find_emulator_symbol("spillover_emulator_follows_blocks"));
  BeginFunction begin =
      reinterpret_cast<BeginFunction>(find_emulator_symbol("spillover_emulator_block_begin"));
  EndFunction end =
      reinterpret_cast<EndFunction>(find_emulator_symbol("spillover_emulator_block_end"));
};

// The driver is loaded by now: it gave the pool its memory.
const Checker& checker() {
  static const Checker instance;
  return instance;
}

bool is_followed() {
  return checker().follows != nullptr && checker().follows() != 0;
}

}  // namespace

void annotate_block_begin(const void* address, size_t size_bytes) {
  constexpr uint64_t kSharedByAll = 0;
  if (is_followed()) checker().begin(address, size_bytes, kSharedByAll);
}

void annotate_block_end(const void* address) {
  constexpr size_t kAsItBegan = 0;
  if (is_followed()) checker().end(address, kAsItBegan);
}

}  // namespace spillover
