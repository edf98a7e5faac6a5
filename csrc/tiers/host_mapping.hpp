// Page-rounded host memory from mmap, pinned for the device when its owner says so.
//
// Move-only. The mapping is shared and anonymous: after a fork, a private one would be copied on
// write, and the device would go on writing to pages that the parent no longer sees. populate() and
// pin() block (they touch every page); methods may be called from any thread. Destroy it only after
// the last copy on it is complete.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "driver/pinned_region.hpp"
#include "tiers/populate.hpp"

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

// What the pages of one mapping come from.
enum class PageSource {
  kOrdinary,  // Huge ones where the kernel makes them by itself, or populate() has it do so.
  kSetAside,  // The system's stock of huge pages; the size is a multiple of kHugePageBytes.
};

struct HostMappingOptions {
  HugePages huge_pages = HugePages::kAdvise;
  PageSource source = PageSource::kOrdinary;
  std::optional<int> numa_node;  // Where pages come from if it has any.
};

class HostMapping {
 public:
  HostMapping() = default;  // Of nothing.
  // size_bytes must be a multiple of the page. Throws HostOutOfMemoryError.
  HostMapping(size_t size_bytes, const HostMappingOptions& options);
  ~HostMapping();
  HostMapping(HostMapping&& other) noexcept;
  HostMapping& operator=(HostMapping&& other) noexcept;
  HostMapping(const HostMapping&) = delete;
  HostMapping& operator=(const HostMapping&) = delete;

  // Has all pages made, on several threads; see populate.hpp. Throws what that does.
  void populate(const PopulateOptions& options);

  // Registers it with the driver through the device's context. Once. Throws HostOutOfMemoryError or
  // DriverError.
  void pin(int device);

  std::byte* address() const { return address_; }
  size_t size_bytes() const { return size_bytes_; }
  // On huge pages that were set aside, or that populate() had made.
  size_t huge_page_bytes() const { return huge_page_bytes_; }
  // Why it does not prefer its node; empty where it does, or was not to.
  const std::string& numa_note() const { return numa_note_; }

 private:
  std::byte* address_ = nullptr;  // Null where it is of nothing, or moved from.
  size_t size_bytes_ = 0;
  size_t huge_page_bytes_ = 0;
  std::string numa_note_;
  std::optional<PinnedRegion> pinned_;  // Goes before the mapping.
};

size_t host_page_bytes();

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
