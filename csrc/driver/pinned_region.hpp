// A range of host memory that the device may copy from and to without staging.
//
// Move-only. It pins memory that somebody else owns and that must outlive it. Methods may be called
// from any thread. Destroy it only after the last copy on the range is complete.
#pragma once

#include <cstddef>

namespace spillover {

class PinnedRegion {
 public:
  // address and size_bytes must be multiples of the system's page (ConfigError). The region is
  // usable from every device's context. Throws HostOutOfMemoryError where the system refuses to
  // lock more memory, and DriverError. Blocks: pinning touches every page.
  PinnedRegion(int device, void* address, size_t size_bytes);
  ~PinnedRegion();

  // Unpins the memory ahead of the destructor. False where the driver may still hold it, which is
  // reported: the memory must not be given to anyone else then.
  bool release() noexcept;
  PinnedRegion(PinnedRegion&& other) noexcept;
  PinnedRegion& operator=(PinnedRegion&& other) noexcept;
  PinnedRegion(const PinnedRegion&) = delete;
  PinnedRegion& operator=(const PinnedRegion&) = delete;

  void* address() const { return address_; }
  size_t size_bytes() const { return size_bytes_; }

 private:
  int device_ = -1;
  void* address_ = nullptr;  // Null when moved from.
  size_t size_bytes_ = 0;
};

}  // namespace spillover
