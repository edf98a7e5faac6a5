// What a user can set about the pools, and the text form of it.
//
// Values; parse_settings() is thread-safe.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string_view>

namespace spillover {

enum class VirtualMemory {
  kAuto,  // where the device has it
  kOn,    // or an error
  kOff,   // chunks stay at the addresses that cuMemAlloc gives
};

struct Settings {
  static constexpr size_t kNoLimit = std::numeric_limits<size_t>::max();

  size_t limit_bytes = kNoLimit;  // of what a pool holds
  double fraction = 1.0;          // of the device's memory, as a limit too
  // How long a request waits on the host for memory that streams still use; 0 takes what is
  // complete.
  std::chrono::milliseconds wait_max{60'000};
  VirtualMemory virtual_memory = VirtualMemory::kAuto;
  size_t unmapped_max_bytes = kNoLimit;  // of idle chunks that are kept without an address
  bool has_thread_cache = true;          // whether threads keep magazines
  // Calls under the mutex between two walks of check_invariants(); 0 is never. Note [Checks at
  // intervals] in pool_check.cpp.
#ifdef NDEBUG
  uint32_t check_every = 0;
#else
  uint32_t check_every = 64;
#endif
};

// What settings become by a text such as "limit=20GiB,wait_max=30s"; blanks around keys and values
// do not count, and keys that the text does not name keep their values. source is where the text
// comes from, for messages. Throws ConfigError that names what is wrong and what would be right:
// for an unknown key the nearest known one.
Settings parse_settings(std::string_view text, std::string_view source, const Settings& settings);

}  // namespace spillover
