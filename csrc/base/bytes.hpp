// Byte counts: constants, rounding and text such as "1.50 GiB".
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

namespace spillover {

inline constexpr size_t kKiB = size_t{1} << 10;
inline constexpr size_t kMiB = size_t{1} << 20;
inline constexpr size_t kGiB = size_t{1} << 30;
inline constexpr size_t kTiB = size_t{1} << 40;

// alignment must be a power of two. The sum must not overflow: callers bound size first.
constexpr size_t round_up(size_t size, size_t alignment) {
  return (size + alignment - 1) & ~(alignment - 1);
}

constexpr size_t round_down(size_t size, size_t alignment) {
  return size & ~(alignment - 1);
}

// "512 B", "1.50 GiB": binary units, two decimals from KiB on.
std::string format_bytes(size_t size_bytes);

// "0x7f0012340000".
std::string format_address(const void* pointer);

// Bytes in a text such as "20GiB", "1.5 GB" or "4096"; GB is 10^9, GiB 2^30, and case does not
// count. Empty where it is no such text or too large.
std::optional<size_t> parse_bytes(std::string_view text);

}  // namespace spillover
