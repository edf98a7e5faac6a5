#include "tiers/system_memory.hpp"

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <optional>
#include <string>
#include <string_view>

#include "base/bytes.hpp"

namespace spillover {
namespace {

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

size_t left_in_group(const std::string& folder, const char* limit_file, const char* usage_file,
                     const char* cache_field) {
  const auto limit = read_number(folder + limit_file);
  if (!limit) return SIZE_MAX;
  const size_t usage = read_number(folder + usage_file).value_or(0);
  const size_t cache = read_field(folder + "/memory.stat", cache_field).value_or(0);
  const size_t held = usage > cache ? usage - cache : 0;
  return *limit > held ? *limit - held : 0;
}

// A limit may sit on any group from the process's own up to the root.
size_t left_in_groups(const std::string& root, std::string path, bool is_version_2) {
  size_t left = SIZE_MAX;
  while (true) {
    const std::string folder = root + path;
    left = std::min(left,
                    is_version_2
                        ? left_in_group(folder, "/memory.max", "/memory.current", "inactive_file")
                        : left_in_group(folder, "/memory.limit_in_bytes", "/memory.usage_in_bytes",
                                        "total_inactive_file"));
    const size_t slash = path.rfind('/');
    if (path.empty() || slash == std::string::npos) return left;
    path.resize(slash);
  }
}

}  // namespace

size_t available_host_bytes() {
  size_t available = SIZE_MAX;
  if (const auto kib = read_field("/proc/meminfo", "MemAvailable:")) available = *kib * kKiB;
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string path = line.substr(second + 1);
    if (controllers.empty()) {
      available = std::min(available, left_in_groups("/sys/fs/cgroup", path, true));
    } else if (("," + controllers + ",").find(",memory,") != std::string::npos) {
      available = std::min(available, left_in_groups("/sys/fs/cgroup/memory", path, false));
    }
  }
  return available;
}

}  // namespace spillover
