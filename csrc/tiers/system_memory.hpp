// How much host memory this process may still take: the machine's and its control groups'.
//
// Thread-safe. Reads files under /proc and /sys at each call (tens of microseconds).
#pragma once

#include <cstddef>

namespace spillover {

// The least of the machine's available memory and what each enclosing memory control group (version
// 1 or 2) leaves, page cache that can be dropped counted as free. SIZE_MAX where nothing is known.
size_t available_host_bytes();

}  // namespace spillover
