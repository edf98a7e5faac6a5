// Memory that a ring's transfers go through: bounce buffers, for what the device cannot have as it
// is, and the memory that callers have registered, which spares the kernel to look up its pages
// each time. Both are registered as far as the limit on locked memory (ulimit -l) allows.
//
// The ring thread's. PRIVATE to tiers/.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "tiers/extent_io.hpp"
#include "tiers/io_uring.hpp"

namespace spillover {

class UringBuffers {
 public:
  static constexpr size_t kBounceBytes = size_t{512} << 10;
  static constexpr size_t kBouncesMax = 8;
  static constexpr size_t kRegionsMax = 256;                  // Parts of registered memory.
  static constexpr size_t kRegionBytesMax = size_t{1} << 30;  // Of each; the kernel's limit.

  // The ring outlives it. Throws std::bad_alloc.
  explicit UringBuffers(IoUring& ring);

  // What the limit does not let us have; empty where all is well.
  std::string notes() const;

  // Nothing where all are taken.
  std::optional<size_t> take_bounce() noexcept;
  void give_back(size_t bounce) noexcept { free_bounces_.push_back(bounce); }
  size_t free_bounces() const { return free_bounces_.size(); }
  std::byte* bounce(size_t index) const { return bounces_.get() + index * kBounceBytes; }
  // What the kernel knows it by; below zero where it does not.
  int number_of_bounce(size_t index) const;

  // Registers as much from the beginning as the limit and the table allow; the bytes.
  size_t add(std::byte* address, size_t size_bytes);
  void remove(std::byte* address) noexcept;
  // Below zero where the memory is not registered, or not in one part.
  int number_of(const std::byte* data, size_t size_bytes) const noexcept;

 private:
  struct Region {
    std::byte* owner;  // The address that was registered, of which this is a part.
    size_t size_bytes;
    uint32_t index;  // In the kernel's table.
  };

  void register_bounces();

  IoUring& ring_;
  BlockMemory bounces_;
  std::vector<size_t> free_bounces_;
  size_t registered_bounces_ = 0;         // The first ones.
  std::map<std::byte*, Region> regions_;  // By their addresses.
  std::vector<uint32_t> free_regions_;    // Their indices come after the bounce buffers'.
};

}  // namespace spillover
