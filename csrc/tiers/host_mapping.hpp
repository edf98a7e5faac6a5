// Page-rounded host memory from mmap, pinned for the device unless asked otherwise.
//
// Move-only. The mapping is shared and anonymous: after a fork, a private one would be copied on
// write, and the device would go on writing to pages that the parent no longer sees. Its creation
// blocks (pinning touches every page); methods may be called from any thread. Destroy it only after
// the last copy on it is complete.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "driver/pinned_region.hpp"

namespace spillover {

enum class Pinning {
  kPinned,    // Registered with the driver; needs one.
  kPageable,  // For staging between files on a machine without a device.
};

class HostMapping {
 public:
  // size_bytes must be a multiple of the page. Throws HostOutOfMemoryError or DriverError.
  HostMapping(size_t size_bytes, Pinning pinning, int device);
  ~HostMapping();
  HostMapping(HostMapping&& other) noexcept;
  HostMapping& operator=(HostMapping&& other) noexcept;
  HostMapping(const HostMapping&) = delete;
  HostMapping& operator=(const HostMapping&) = delete;

  std::byte* address() const { return address_; }
  size_t size_bytes() const { return size_bytes_; }

 private:
  std::byte* address_ = nullptr;  // Null when moved from.
  size_t size_bytes_ = 0;
  std::optional<PinnedRegion> pinned_;  // Goes before the mapping.
};

size_t host_page_bytes();

// Of all mappings of the process. Any thread may ask.
struct PinStats {
  uint64_t count;  // Regions that were pinned,
  uint64_t bytes;  // and what they have together.
  double pin_s;    // Summed over threads.
  double unpin_s;  // Unmapping included.
};

PinStats pin_stats();

}  // namespace spillover
