// Names of arenas (block.hpp), the same for every device.
//
// An arena is made by naming it and lives as long as the process. Thread-safe.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "allocator/block.hpp"

namespace spillover {

inline constexpr size_t kArenasMax = 4096;
inline constexpr size_t kArenaNameMax = 256;  // bytes

// The arena of that name; the default one for an empty name. Throws ConfigError for a name that is
// too long or the one that is too many.
ArenaId arena_of(std::string_view name);

// The same where the name was used before.
std::optional<ArenaId> find_arena(std::string_view name);

// Throws ConfigError for an arena that nobody has named; a private one has an empty name.
std::string arena_name(ArenaId arena);

// By ArenaId.
std::vector<std::string> arena_names();

}  // namespace spillover
