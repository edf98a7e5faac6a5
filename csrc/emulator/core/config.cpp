#include "emulator/core/config.hpp"

#include <strings.h>

#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string_view>

#include "emulator/core/types.hpp"

namespace spillover::emulator {
namespace {

struct Unit {
  const char* name;
  double bytes;
};

constexpr Unit kUnits[] = {{"", 1},
                           {"B", 1},
                           {"KiB", 1024.0},
                           {"MiB", 1048576.0},
                           {"GiB", 1073741824.0},
                           {"TiB", 1099511627776.0},
                           {"KB", 1e3},
                           {"MB", 1e6},
                           {"GB", 1e9},
                           {"TB", 1e12}};

// The same bounds as in Python's options: what a context and torch's first segments fit into, and
// what the address range has room for.
constexpr std::size_t kVramBytesMin = std::size_t{4} << 20;
constexpr std::size_t kVramBytesMax = std::size_t{1} << 40;

// An expert cannot get more than all tokens.
constexpr double kImbalanceMax = 1024;

bool parse_bytes(const char* text, std::size_t* bytes) {
  char* end = nullptr;
  const double number = std::strtod(text, &end);
  if (end == text || !std::isfinite(number) || number < 0) return false;
  while (*end == ' ') ++end;
  for (const Unit& unit : kUnits) {
    if (strcasecmp(end, unit.name) != 0) continue;
    const double value = number * unit.bytes;
    if (value >= 9e18) return false;
    *bytes = static_cast<std::size_t>(value);
    return true;
  }
  return false;
}

bool parse_integer(const char* text, std::uint64_t maximum, std::uint64_t* value) {
  if (*text < '0' || *text > '9') return false;  // strtoull accepts signs and blanks
  char* end = nullptr;
  errno = 0;
  *value = std::strtoull(text, &end, 10);
  return errno == 0 && *end == '\0' && *value <= maximum;
}

// Reads the variables one by one and keeps the first complaint.
class Reader {
 public:
  Reader(const char* (*variable)(const char*), Config* config)
      : variable_(variable), config_(config) {}

  void vram(const char* name, std::size_t* value) {
    const char* text = lookup(name);
    std::size_t parsed = 0;
    if (text == nullptr) {
    } else if (parse_bytes(text, &parsed) && parsed >= kVramBytesMin && parsed <= kVramBytesMax) {
      *value = parsed;
    } else {
      complain(name, text, "4MiB to 1TiB");
    }
    describe(name, std::to_string(*value));
  }

  template <typename Number>
  void integer(const char* name, std::uint64_t minimum, std::uint64_t maximum, Number* value) {
    const char* text = lookup(name);
    std::uint64_t parsed = 0;
    if (text == nullptr) {
    } else if (parse_integer(text, maximum, &parsed) && parsed >= minimum) {
      *value = static_cast<Number>(parsed);
    } else {
      complain(name, text,
               "a whole number from " + std::to_string(minimum) + " to " + std::to_string(maximum));
    }
    describe(name, std::to_string(*value));
  }

  // "uniform", or how many times the mean load the busiest expert gets.
  void routing(const char* name, double* value) {
    const char* const text = lookup(name);
    if (text != nullptr && std::strcmp(text, "uniform") == 0) {
      *value = 1;
    } else if (text != nullptr) {
      char* end = nullptr;
      *value = std::strtod(text, &end);
      if (end == text || *end != '\0' || !(*value >= 1 && *value <= kImbalanceMax)) {
        complain(name, text, "uniform, or a number from 1 to 1024");
      }
    }
    describe(name, text == nullptr ? "" : text);
  }

  void flag(const char* name, bool* value) {
    int number = *value ? 1 : 0;
    integer(name, 0, 1, &number);
    *value = number == 1;
  }

  // A flat text of several lines is not described: it would hide the rest.
  void profile(const char* name, const char* values_name, std::string* value,
               ClockProfile* profile) {
    const char* const text = lookup(name);
    if (text != nullptr) *value = text;
    const char* const values = lookup(values_name);
    const std::string complaint = profile->read(values == nullptr ? "" : values);
    if (config_->error.empty()) config_->error = complaint;
    describe(name, *value);
  }

  template <typename Enum, std::size_t kCount>
  void choice(const char* name, const char* const (&names)[kCount], Enum* value) {
    const char* text = lookup(name);
    bool found = text == nullptr;
    std::string expected;
    for (std::size_t i = 0; i < kCount; ++i) {
      expected += (i == 0 ? "" : i + 1 == kCount ? " or " : ", ") + std::string(names[i]);
      if (text == nullptr || std::strcmp(text, names[i]) != 0) continue;
      *value = static_cast<Enum>(i);
      found = true;
    }
    if (!found) complain(name, text, expected);
    describe(name, names[static_cast<std::size_t>(*value)]);
  }

 private:
  const char* lookup(const char* name) const {
    const char* text = variable_(name);
    return text == nullptr || *text == '\0' ? nullptr : text;
  }

  void complain(const char* name, const char* text, const std::string& expected) {
    if (!config_->error.empty()) return;
    config_->error = std::string(name) + "=" + text + " is not valid: use " + expected + ".";
  }

  void describe(const char* name, const std::string& value) {
    config_->description += std::string(name) + "=" + value + "\n";
  }

  const char* (*variable_)(const char*);
  Config* config_;
};

}  // namespace

Config read_config(const char* (*variable)(const char*)) {
  static constexpr const char* kSchedules[] = {"late", "eager", "threaded", "random"};
  static constexpr const char* kPolicies[] = {"off", "count", "warn", "raise"};
  static constexpr const char* kUnknown[] = {"error", "zero", "one"};
  Config config;
  Reader reader(variable, &config);
  reader.integer("SPILLOVER_EMULATOR_DEVICES", 1, kDeviceCountMax, &config.device_count);
  reader.vram("SPILLOVER_EMULATOR_VRAM", &config.vram_bytes);
  reader.choice("SPILLOVER_EMULATOR_SCHEDULE", kSchedules, &config.schedule);
  reader.integer("SPILLOVER_EMULATOR_SEED", 0, std::numeric_limits<std::int64_t>::max(),
                 &config.seed);
  reader.choice("SPILLOVER_EMULATOR_HAZARDS", kPolicies, &config.hazards);
  reader.flag("SPILLOVER_EMULATOR_POISON", &config.poison);
  reader.flag("SPILLOVER_EMULATOR_VIRTUAL_MEMORY", &config.virtual_memory);
  reader.flag("SPILLOVER_EMULATOR_UNINITIALIZED", &config.uninitialized);
  reader.integer("SPILLOVER_EMULATOR_QUERY_SPINS", 0, 1000000000, &config.query_spins);
  reader.integer("SPILLOVER_EMULATOR_COPY_DELAY_US", 0, 60000000, &config.copy_delay_us);
  reader.flag("SPILLOVER_EMULATOR_VERBOSE", &config.verbose);
  reader.flag("SPILLOVER_EMULATOR_CLOCK", &config.clock);
  reader.profile("SPILLOVER_EMULATOR_PROFILE", "SPILLOVER_EMULATOR_PROFILE_VALUES",
                 &config.profile_name, &config.profile);
  reader.flag("SPILLOVER_EMULATOR_DRY", &config.dry);
  reader.choice("SPILLOVER_EMULATOR_UNKNOWN", kUnknown, &config.unknown);
  reader.routing("SPILLOVER_EMULATOR_ROUTING", &config.routing);
  return config;
}

namespace {

// Leaked on purpose: threads of the emulator and of its users outlive static destructors.
const Config* make_config() {
  return new Config(
      read_config([](const char* name) { return static_cast<const char*>(std::getenv(name)); }));
}

std::atomic<const Config*>& current_config() {
  static std::atomic<const Config*> current = make_config();
  return current;
}

}  // namespace

const Config& config() {
  return *current_config().load(std::memory_order_acquire);
}

void read_config_again() {
  current_config().store(make_config(), std::memory_order_release);
}

}  // namespace spillover::emulator
