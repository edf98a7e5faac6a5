#include "base/bytes.hpp"

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <utility>

namespace spillover {

std::string format_bytes(size_t size_bytes) {
  static constexpr std::array<const char*, 4> kUnits = {"KiB", "MiB", "GiB", "TiB"};
  if (size_bytes < kKiB) return std::to_string(size_bytes) + " B";
  double value = static_cast<double>(size_bytes) / static_cast<double>(kKiB);
  size_t unit = 0;
  while (value >= 1024.0 && unit + 1 < kUnits.size()) {
    value /= 1024.0;
    ++unit;
  }
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%.2f %s", value, kUnits[unit]);
  return text.data();
}

std::string format_address(const void* pointer) {
  std::array<char, 24> text{};
  std::snprintf(text.data(), text.size(), "%p", pointer);
  return text.data();
}

std::optional<size_t> parse_bytes(std::string_view text) {
  static constexpr std::array<std::pair<std::string_view, double>, 10> kUnits{{
      {"", 1.0},
      {"b", 1.0},
      {"kb", 1e3},
      {"mb", 1e6},
      {"gb", 1e9},
      {"tb", 1e12},
      {"kib", 0x1p10},
      {"mib", 0x1p20},
      {"gib", 0x1p30},
      {"tib", 0x1p40},
  }};
  double number = 0.0;
  const char* const end = text.data() + text.size();
  const auto result = std::from_chars(text.data(), end, number, std::chars_format::fixed);
  if (result.ec != std::errc()) return std::nullopt;
  std::string unit(result.ptr, end);
  unit.erase(0, std::min(unit.find_first_not_of(' '), unit.size()));
  std::transform(unit.begin(), unit.end(), unit.begin(),
                 [](unsigned char letter) { return std::tolower(letter); });
  for (const auto& [name, factor] : kUnits) {
    // Sums of sizes must not overflow.
    if (name == unit && number >= 0.0 && number * factor <= 0x1p56) {
      return static_cast<size_t>(std::floor(number * factor));
    }
  }
  return std::nullopt;
}

}  // namespace spillover
