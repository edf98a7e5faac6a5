// The nearest of some names to one that nobody knows, for the message of an error.
#pragma once

#include <span>
#include <string>
#include <string_view>

namespace spillover {

// The name with the fewest letters to insert, remove, replace or swap with a neighbour (optimal
// string alignment distance; case does not count), where one that begins with the other is near.
// names must not be empty.
std::string_view nearest_name(std::string_view name, std::span<const std::string_view> names);

// "a, b and c".
std::string list_names(std::span<const std::string_view> names);

}  // namespace spillover
