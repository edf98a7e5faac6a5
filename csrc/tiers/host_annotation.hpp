// Tells the emulated device's hazard checker which host memory a thread of ours reads or writes.
//
// The checker sees copies and torch's operators by itself, but not a disk engine that touches
// pinned memory. On a real driver the function is absent and an annotation costs one relaxed load.
// Thread-safe.
#pragma once

#include <cstddef>

namespace spillover {

enum class HostAccess { kRead, kWrite };

// name appears in the checker's report. Throws StateError with the report where the checker's
// policy is to raise and no event orders this access after the device's work on the same bytes.
void annotate_host_access(const char* name, const void* address, size_t size_bytes,
                          HostAccess access);

}  // namespace spillover
