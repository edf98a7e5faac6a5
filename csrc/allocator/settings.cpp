#include "allocator/settings.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/bytes.hpp"
#include "base/error.hpp"
#include "base/nearest.hpp"

namespace spillover {
namespace {

using std::chrono::milliseconds;

constexpr double kSecondsMax = 86'400.0;

std::string_view trimmed(std::string_view text) {
  constexpr std::string_view kBlanks = " \t\n\r";
  const size_t begin = text.find_first_not_of(kBlanks);
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(kBlanks) - begin + 1);
}

// One key and its value, and how to complain about them.
struct Entry {
  std::string_view source;
  std::string_view key;
  std::string_view value;

  [[noreturn]] void refuse(const std::string& what_would_be_right) const {
    throw ConfigError(std::string(source) + ": " + std::string(key) + "=" + std::string(value) +
                      " is not understood; " + what_would_be_right);
  }
};

// A number at the start of the text and what follows it; empty where there is no number.
std::optional<std::pair<double, std::string_view>> read_number(std::string_view text) {
  double number = 0.0;
  const auto [end, error] =
      std::from_chars(text.data(), text.data() + text.size(), number, std::chars_format::fixed);
  if (error != std::errc() || !std::isfinite(number)) return std::nullopt;
  return std::pair(number, trimmed(text.substr(static_cast<size_t>(end - text.data()))));
}

size_t read_limit(const Entry& entry) {
  if (entry.value == "none") return Settings::kNoLimit;
  if (const auto size_bytes = parse_bytes(entry.value)) {
    if (*size_bytes == 0 && entry.value.find_first_of("123456789") != std::string_view::npos) {
      entry.refuse("it is less than a byte; for a share of the device write fraction");
    }
    return *size_bytes;
  }
  entry.refuse("write a size with a unit, such as 20GiB or 512MB, or none");
}

double read_fraction(const Entry& entry) {
  const auto number = read_number(entry.value);
  if (!number || !number->second.empty() || !(number->first >= 0.0 && number->first <= 1.0)) {
    entry.refuse("write a share of the device's memory from 0 to 1, such as 0.8");
  }
  return number->first;
}

milliseconds read_duration(const Entry& entry) {
  const auto number = read_number(entry.value);
  if (number && number->first >= 0.0) {
    const std::string_view unit = number->second;
    const double seconds = unit == "ms" ? number->first / 1e3 : number->first;
    const bool has_unit = unit.empty() || unit == "s" || unit == "ms";
    if (has_unit && seconds <= kSecondsMax) {
      return milliseconds(std::llround(seconds * 1e3));
    }
  }
  entry.refuse("write a time of at most 86400s, such as 30s or 500ms");
}

uint32_t read_count(const Entry& entry) {
  uint32_t count = 0;
  const char* const end = entry.value.data() + entry.value.size();
  const auto result = std::from_chars(entry.value.data(), end, count);
  if (result.ec != std::errc() || result.ptr != end) {
    entry.refuse("write a whole number of calls, 0 for never");
  }
  return count;
}

bool read_switch(const Entry& entry) {
  if (entry.value == "on") return true;
  if (entry.value == "off") return false;
  entry.refuse("write on or off");
}

VirtualMemory read_virtual_memory(const Entry& entry) {
  if (entry.value == "auto") return VirtualMemory::kAuto;
  if (entry.value == "on") return VirtualMemory::kOn;
  if (entry.value == "off") return VirtualMemory::kOff;
  entry.refuse("write auto, on or off");
}

// The keys in alphabetical order, each with what it changes.
using Reader = void (*)(const Entry&, Settings&);
constexpr std::array<std::pair<std::string_view, Reader>, 7> kKeys{{
    {"check_every", [](const Entry& e, Settings& s) { s.check_every = read_count(e); }},
    {"fraction", [](const Entry& e, Settings& s) { s.fraction = read_fraction(e); }},
    {"limit", [](const Entry& e, Settings& s) { s.limit_bytes = read_limit(e); }},
    {"thread_cache", [](const Entry& e, Settings& s) { s.has_thread_cache = read_switch(e); }},
    {"unmapped_max", [](const Entry& e, Settings& s) { s.unmapped_max_bytes = read_limit(e); }},
    {"virtual_memory",
     [](const Entry& e, Settings& s) { s.virtual_memory = read_virtual_memory(e); }},
    {"wait_max", [](const Entry& e, Settings& s) { s.wait_max = read_duration(e); }},
}};

[[noreturn]] void refuse_key(std::string_view source, std::string_view key) {
  std::vector<std::string_view> names;
  for (const auto& [name, reader] : kKeys) names.push_back(name);
  throw ConfigError(std::string(source) + ": there is no setting '" + std::string(key) +
                    "'; the nearest is '" + std::string(nearest_name(key, names)) + "' (of " +
                    list_names(names) + ")");
}

void read_entry(const Entry& entry, Settings& settings) {
  for (const auto& [name, reader] : kKeys) {
    if (name != entry.key) continue;
    reader(entry, settings);
    return;
  }
  refuse_key(entry.source, entry.key);
}

}  // namespace

Settings parse_settings(std::string_view text, std::string_view source, const Settings& settings) {
  Settings result = settings;
  std::vector<std::string_view> seen;
  while (!trimmed(text).empty()) {
    const size_t comma = text.find(',');
    const std::string_view part = trimmed(text.substr(0, comma));
    text = comma == std::string_view::npos ? std::string_view{} : text.substr(comma + 1);
    const size_t equals = part.find('=');
    if (equals == std::string_view::npos) {
      throw ConfigError(std::string(source) + ": '" + std::string(part) +
                        "' is not a setting; write key=value, with commas between, such as "
                        "limit=20GiB,wait_max=30s");
    }
    const Entry entry{source, trimmed(part.substr(0, equals)), trimmed(part.substr(equals + 1))};
    read_entry(entry, result);
    if (std::find(seen.begin(), seen.end(), entry.key) != seen.end()) {
      throw ConfigError(std::string(source) + ": " + std::string(entry.key) + " is set twice");
    }
    seen.push_back(entry.key);
  }
  return result;
}

}  // namespace spillover
