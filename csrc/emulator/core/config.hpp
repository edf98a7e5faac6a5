// How the emulated device is configured: the SPILLOVER_EMULATOR_* environment variables, read at
// first use. The result is constant and may be read by any thread without a lock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "emulator/core/clock/profile.hpp"
#include "emulator/core/report.hpp"

namespace spillover::emulator {

// When queued operations run. Each is a legal behaviour of a GPU; a correct program cannot tell.
enum class Schedule {
  kLate,      // only when something waits for them: whoever forgets to wait sees stale bytes
  kEager,     // at once, in the thread that enqueued them
  kThreaded,  // on a worker thread, concurrently with the host
  kRandom,    // a seeded choice of ready operations at each API call
};

// What happens when two accesses to the same bytes are not ordered.
enum class HazardPolicy {
  kOff,    // nothing is recorded, nothing is paid
  kCount,  // kept for spillover_emulator_hazard_text
  kWarn,   // and written to stderr
  kRaise,  // and the call returns CUDA_ERROR_UNKNOWN
};

// What host code gets where it asks a dry run for an unknown value (known_bytes.hpp).
enum class UnknownPolicy { kError, kZero, kOne };

struct Config {
  int device_count = 1;
  std::size_t vram_bytes = std::size_t{8} << 30;
  Schedule schedule = Schedule::kLate;
  std::uint64_t seed = 0;
  HazardPolicy hazards = HazardPolicy::kWarn;
  bool poison = true;
  bool virtual_memory = true;  // cuMemCreate, cuMemMap and so on
  bool uninitialized = false;  // reads of device memory that was never written are hazards
  int query_spins = 16;
  int copy_delay_us = 0;
  bool verbose = false;
  bool clock = false;        // the virtual clock
  std::string profile_name;  // whose numbers it uses
  ClockProfile profile;
  bool dry = false;  // memory has addresses and no bytes
  UnknownPolicy unknown = UnknownPolicy::kError;
  double routing = 0;  // the busiest expert's load over the mean; 0: no routing model

  // One sentence about the first malformed variable; empty when all are well formed.
  std::string error;

  // The variables and their values, one "name=value" a line.
  std::string description;
};

const Config& config();

// Reads the variables again: config() gives another object from now on. For who knows that nobody
// has used a device yet.
void read_config_again();

// Reads a configuration from a function like getenv. Split off so that it can be tested.
Config read_config(const char* (*variable)(const char* name));

}  // namespace spillover::emulator
