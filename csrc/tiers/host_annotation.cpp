#include "tiers/host_annotation.hpp"

#include <string>
#include <vector>

#include "base/emulator_symbol.hpp"
#include "base/error.hpp"

namespace spillover {
namespace {

// The part of the emulator's C interface that is used here, declared again because the product
// shares no header with the emulator.
struct EmulatorRange {
  const void* pointer;
  size_t size_bytes;
  int is_write;
};
using HostAccessFunction = int (*)(const char*, const EmulatorRange*, size_t);
using LastHazardFunction = const char* (*)();
using HostPhantomFunction = int (*)(const EmulatorRange*, size_t);

struct Checker {
  HostAccessFunction host_access =
      reinterpret_cast<HostAccessFunction>(find_emulator_symbol("spillover_emulator_host_access"));
  LastHazardFunction last_hazard =
      reinterpret_cast<LastHazardFunction>(find_emulator_symbol("spillover_emulator_last_hazard"));
};

}  // namespace

void annotate_host_access(const char* name, const void* address, size_t size_bytes,
                          HostAccess access) {
  static const Checker checker;
  if (checker.host_access == nullptr || size_bytes == 0) return;
  const EmulatorRange range{address, size_bytes, access == HostAccess::kWrite ? 1 : 0};
  if (checker.host_access(name, &range, 1) == 0) return;
  const char* text = checker.last_hazard != nullptr ? checker.last_hazard() : "no description";
  throw StateError(std::string(name) + " is not ordered after the device's work: " + text);
}

bool annotate_host_work(std::span<const HostRange> ranges) {
  static const auto is_phantom = reinterpret_cast<HostPhantomFunction>(
      find_emulator_symbol("spillover_emulator_host_phantom"));
  if (is_phantom == nullptr) return true;
  std::vector<EmulatorRange> found;
  found.reserve(ranges.size());
  for (const HostRange& range : ranges) {
    found.push_back({range.address, range.size_bytes, range.access == HostAccess::kWrite ? 1 : 0});
  }
  return is_phantom(found.data(), found.size()) == 0;
}

}  // namespace spillover
