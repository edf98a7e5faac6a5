// The numbers of a card and its host that durations are computed from: lines of
// "section.key=value", as spillover.emulator hands them over. Keys that a profile does not have
// keep a round default; docs/cost-model.md and docs/clock.md say what each means.
//
// A plain value, constant once it is read; any thread may read it.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>

namespace spillover::emulator {

using Nanoseconds = std::int64_t;

class ClockProfile {
 public:
  ClockProfile();

  // Reads the lines over what is there. The first complaint, one sentence, or "".
  std::string read(std::string_view text);

  // 0 for a key that nobody knows.
  double at(std::string_view key) const;

  // A duration given in microseconds.
  Nanoseconds microseconds(std::string_view key) const;

  // How long bytes take at a rate given in GB/s (10^9 bytes a second), rounded up.
  Nanoseconds transfer(std::uint64_t bytes, std::string_view rate_key) const;

  // Bytes a microsecond.
  std::int64_t rate(std::string_view key) const;

 private:
  std::map<std::string, double, std::less<>> values_;
};

// Rounded up, and kept in a range whose sums cannot overflow.
Nanoseconds to_nanoseconds(double value);

}  // namespace spillover::emulator
