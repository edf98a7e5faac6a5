// Tells the emulated device which host memory a thread of ours reads or writes: its hazard checker,
// and its dry runs, in which memory has no bytes.
//
// The checker sees copies and torch's operators by itself, but not a disk engine that touches
// pinned memory. On a real driver the function is absent and an annotation costs one relaxed load.
// Thread-safe.
#pragma once

#include <cstddef>
#include <span>

namespace spillover {

enum class HostAccess { kRead, kWrite };

// name appears in the checker's report. Throws StateError with the report where the checker's
// policy is to raise and no event orders this access after the device's work on the same bytes.
void annotate_host_access(const char* name, const void* address, size_t size_bytes,
                          HostAccess access);

struct HostRange {
  const void* address;
  size_t size_bytes;
  HostAccess access;
};

// Whether the ranges have bytes: false in a dry run of the emulated device, where the caller must
// neither read nor write any of them, and what it would have written counts as unknown. Memory that
// is both read and written is given twice. For work whose results nobody decides by.
bool annotate_host_work(std::span<const HostRange> ranges);

}  // namespace spillover
