#include "tiers/system_memory.hpp"

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "base/bytes.hpp"

namespace spillover {
namespace {

enum class Wanted { kAvailable, kTotal };

// The files of one version of control groups.
struct GroupFiles {
  const char* folder;
  // memory.high does not refuse memory, but stops a process that is above it for ever longer times.
  const char* limits[2];
  const char* usage;
  const char* cache_field;  // Of memory.stat: what is given back before anything is refused.
};
constexpr GroupFiles kVersion1{"/sys/fs/cgroup/memory",
                               {"memory.limit_in_bytes", nullptr},
                               "memory.usage_in_bytes",
                               "total_inactive_file"};
constexpr GroupFiles kVersion2{
    "/sys/fs/cgroup", {"memory.max", "memory.high"}, "memory.current", "inactive_file"};

// A file that holds one number; empty for "max", for a missing file and for version 1's "no limit"
// (a number near the end of the range).
std::optional<size_t> read_number(const std::string& path) {
  std::ifstream file(path);
  uint64_t value = 0;
  if (!(file >> value) || value > (uint64_t{1} << 60)) return std::nullopt;
  return static_cast<size_t>(value);
}

// The number after key in a file of "key number" or "key: number kB" lines.
std::optional<size_t> read_field(const std::string& path, std::string_view key) {
  std::ifstream file(path);
  std::string word;
  while (file >> word) {
    uint64_t value = 0;
    if (!(file >> value)) return std::nullopt;
    if (word == key) return static_cast<size_t>(value);
    file.ignore(256, '\n');
  }
  return std::nullopt;
}

void lower(HostMemoryLimit* least, size_t bytes, std::string source) {
  if (bytes < least->bytes) *least = {bytes, std::move(source)};
}

void lower_by_group(HostMemoryLimit* least, const std::string& folder, const std::string& group,
                    const GroupFiles& files, Wanted wanted) {
  for (const char* name : files.limits) {
    if (name == nullptr) continue;
    const auto limit = read_number(folder + "/" + name);
    if (!limit) continue;
    size_t bytes = *limit;
    if (wanted == Wanted::kAvailable) {
      const size_t usage = read_number(folder + "/" + files.usage).value_or(0);
      const size_t cache = read_field(folder + "/memory.stat", files.cache_field).value_or(0);
      const size_t held = usage > cache ? usage - cache : 0;
      bytes = *limit > held ? *limit - held : 0;
    }
    lower(least, bytes,
          std::string(name) + " (" + format_bytes(*limit) + ") of the memory control group " +
              (group.empty() ? "/" : group));
  }
}

// A limit may sit on any group from the process's own up to the root. A container may see its own
// group at the root in place of the path, which the walk ends at.
void lower_by_groups(HostMemoryLimit* least, const std::string& root, std::string group,
                     const GroupFiles& files, Wanted wanted) {
  if (group == "/") group.clear();
  while (true) {
    lower_by_group(least, root + files.folder + group, group, files, wanted);
    const size_t slash = group.rfind('/');
    if (group.empty() || slash == std::string::npos) return;
    group.resize(slash);
  }
}

HostMemoryLimit least_limit(const std::string& root, Wanted wanted) {
  HostMemoryLimit least{SIZE_MAX, "nothing that is known"};
  const bool is_total = wanted == Wanted::kTotal;
  const std::string_view field = is_total ? "MemTotal:" : "MemAvailable:";
  if (const auto kib = read_field(root + "/proc/meminfo", field)) {
    lower(&least, *kib * kKiB,
          is_total ? "this machine's memory (MemTotal)" : "this machine's memory (MemAvailable)");
  }
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string group = line.substr(second + 1);
    if (controllers.empty()) {
      lower_by_groups(&least, root, group, kVersion2, wanted);
    } else if (("," + controllers + ",").find(",memory,") != std::string::npos) {
      lower_by_groups(&least, root, group, kVersion1, wanted);
    }
  }
  return least;
}

}  // namespace

HostMemoryLimit available_host_memory(const std::string& root) {
  return least_limit(root, Wanted::kAvailable);
}

HostMemoryLimit total_host_memory(const std::string& root) {
  return least_limit(root, Wanted::kTotal);
}

}  // namespace spillover
