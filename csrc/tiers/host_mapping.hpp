// Page-rounded host memory from mmap, pinned for the device unless asked otherwise.
//
// Move-only. The mapping is shared and anonymous: after a fork, a private one would be copied on
// write, and the device would go on writing to pages that the parent no longer sees. Its creation
// blocks (pinning touches every page); methods may be called from any thread. Destroy it only after
// the last copy on it is complete.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "driver/pinned_region.hpp"

namespace spillover {

enum class Pinning {
  kPinned,    // Registered with the driver; needs one.
  kPageable,  // For staging between files on a machine without a device.
};

enum class HugePages {
  kAdvise,    // The kernel is told that they would be good; it decides.
  kNever,     // And this tells it not to.
  kReserved,  // Those that the administrator has set aside (vm.nr_hugepages), while there are any;
              // for mappings that they make no more than 2 % larger. Else as kAdvise.
};

struct HostMappingOptions {
  Pinning pinning = Pinning::kPinned;
  int device = 0;  // Whose context pins.
  HugePages huge_pages = HugePages::kAdvise;
  std::optional<int> numa_node;  // Where pages come from if it has any.
};

class HostMapping {
 public:
  // size_bytes must be a multiple of the page. before_pinning, if any, gets the memory to touch it
  // in its own way, and gives the bytes that are on huge pages then; what it throws ends the
  // attempt. Throws HostOutOfMemoryError or DriverError.
  HostMapping(size_t size_bytes, const HostMappingOptions& options,
              const std::function<size_t(std::byte*)>& before_pinning = nullptr);
  ~HostMapping();
  HostMapping(HostMapping&& other) noexcept;
  HostMapping& operator=(HostMapping&& other) noexcept;
  HostMapping(const HostMapping&) = delete;
  HostMapping& operator=(const HostMapping&) = delete;

  std::byte* address() const { return address_; }
  size_t size_bytes() const { return size_bytes_; }
  // On huge pages that were set aside, or that before_pinning told of.
  size_t huge_page_bytes() const { return huge_page_bytes_; }
  // Why it does not prefer its node; empty where it does, or was not to.
  const std::string& numa_note() const { return numa_note_; }

 private:
  void map_pages(HugePages huge_pages);

  std::byte* address_ = nullptr;  // Null when moved from.
  size_t size_bytes_ = 0;
  size_t huge_page_bytes_ = 0;
  std::string numa_note_;
  std::optional<PinnedRegion> pinned_;  // Goes before the mapping.
};

size_t host_page_bytes();
inline constexpr size_t kHugePageBytes = size_t{2} << 20;

// What a mapping of so many bytes takes: whole pages, and whole huge ones where it will have those.
// Round sizes up to this before making one.
size_t mapped_bytes_for(size_t size_bytes, HugePages huge_pages);

// Of all mappings of the process. Any thread may ask.
struct PinStats {
  uint64_t count;  // Regions that were pinned,
  uint64_t bytes;  // and what they have together.
  double pin_s;    // Summed over threads.
  double unpin_s;  // Unmapping included.
};

PinStats pin_stats();

}  // namespace spillover
