#include "allocator/arenas.hpp"

#include <algorithm>
#include <mutex>
#include <vector>

#include "base/error.hpp"
#include "driver/fork_guard.hpp"

namespace spillover {
namespace {

struct Arenas {
  std::mutex mutex;
  std::vector<std::string> names{""};  // By ArenaId; guarded by mutex.

  std::optional<ArenaId> find(std::string_view name) const {
    const auto found = std::find(names.begin(), names.end(), name);
    if (found == names.end()) return std::nullopt;
    return static_cast<ArenaId>(found - names.begin());
  }
};

Arenas& arenas() {
  check_not_forked();
  static Arenas& instance = *new Arenas;
  return instance;
}

}  // namespace

ArenaId arena_of(std::string_view name) {
  Arenas& all = arenas();
  const std::lock_guard lock(all.mutex);
  if (const auto known = all.find(name)) return *known;
  if (name.size() > kArenaNameMax) {
    throw ConfigError("a tag has at most " + std::to_string(kArenaNameMax) + " bytes, got " +
                      std::to_string(name.size()));
  }
  if (all.names.size() == kArenasMax) {
    throw ConfigError("there are " + std::to_string(kArenasMax) +
                      " tags already; use a few names again instead of a new one each time");
  }
  all.names.emplace_back(name);
  return static_cast<ArenaId>(all.names.size() - 1);
}

std::optional<ArenaId> find_arena(std::string_view name) {
  Arenas& all = arenas();
  const std::lock_guard lock(all.mutex);
  return all.find(name);
}

std::vector<std::string> arena_names() {
  Arenas& all = arenas();
  const std::lock_guard lock(all.mutex);
  return all.names;
}

std::string arena_name(ArenaId arena) {
  if (is_private_arena(arena)) return "";
  Arenas& all = arenas();
  const std::lock_guard lock(all.mutex);
  if (arena >= all.names.size()) {
    throw ConfigError("there is no tag number " + std::to_string(arena));
  }
  return all.names[arena];
}

}  // namespace spillover
