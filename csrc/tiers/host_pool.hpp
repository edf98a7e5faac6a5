// Pinned host memory under a hard byte budget.
//
// A HostPool is shared by its buffers and its users (shared_ptr); both may be used from any thread.
// allocate() and trim() may block in the driver, and hold no lock while they do.
//
// Sizes of kSmallMax and above get a mapping of their own, rounded up to the page: at most 2 %
// above the request from 200 KiB on. A freed mapping stays pinned and is given out again for
// exactly the same rounded size, since pinning costs more than a copy. Smaller sizes share slabs of
// kSlabBytes, each divided into slots of one size: 64-byte steps up to 1 KiB, then eight steps a
// doubling, so a slot wastes at most 1/8 of itself, and a size class in use holds at least one
// slab.
//
// Note [Reuse of host memory]. A freed buffer may be handed out at once. The pool knows nothing of
// streams: whoever frees a buffer has seen the event of the last copy on it complete.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "tiers/host_mapping.hpp"
#include "tiers/host_regions.hpp"
#include "trace/tracks.hpp"

namespace spillover {

class HostPool;

// Memory of a pool; gives itself back. Move-only. It keeps its pool alive.
class HostBuffer {
 public:
  HostBuffer() = default;
  ~HostBuffer();
  HostBuffer(HostBuffer&& other) noexcept;
  HostBuffer& operator=(HostBuffer&& other) noexcept;
  HostBuffer(const HostBuffer&) = delete;
  HostBuffer& operator=(const HostBuffer&) = delete;

  std::byte* address() const { return address_; }
  // What was asked for; the memory reaches to the next page or slot, which belongs to nobody else.
  size_t size_bytes() const { return size_bytes_; }

 private:
  friend class HostPool;
  HostBuffer(std::shared_ptr<HostPool> pool, std::byte* address, size_t size_bytes)
      : pool_(std::move(pool)), address_(address), size_bytes_(size_bytes) {}

  std::shared_ptr<HostPool> pool_;
  std::byte* address_ = nullptr;
  size_t size_bytes_ = 0;
};

// Where the pages of pinned memory should lie.
enum class NumaChoice {
  kNearest,  // At the node that the pool's device is nearest to.
  kNode,     // At numa_node.
  kAny,
};

struct HostPoolOptions {
  size_t limit_bytes = SIZE_MAX;  // Bound on reserved bytes.
  std::string limit_source;       // What set the limit, for errors; empty: the caller did.
  int device = 0;                 // Whose context pins; the memory serves every device.
  Pinning pinning = Pinning::kPinned;
  HugePages huge_pages = HugePages::kAdvise;
  NumaChoice numa = NumaChoice::kNearest;
  int numa_node = 0;
};

struct HostStats {
  size_t used_bytes;  // Sizes of the live buffers, rounded to their pages or slots.
  size_t used_bytes_max;
  size_t reserved_bytes;  // Mapped: in use or kept for reuse. Never above limit_bytes.
  size_t reserved_bytes_max;
  size_t limit_bytes;
  size_t buffer_count;           // Live buffers.
  size_t ahead_bytes;            // Pinned by reserve() and in use by nobody.
  size_t huge_page_bytes;        // On huge pages that were set aside, or made by reserve().
  std::optional<int> numa_node;  // Which memory comes from, once there is any.
  std::string numa_note;         // Why it does not; empty where all is well.
};

class HostPool : public std::enable_shared_from_this<HostPool> {
 public:
  static constexpr size_t kSmallMax = size_t{32} << 10;
  static constexpr size_t kSlabBytes = size_t{128} << 10;

  static std::shared_ptr<HostPool> create(const HostPoolOptions& options);
  HostPool(const HostPool&) = delete;
  HostPool& operator=(const HostPool&) = delete;

  // Contents are undefined; the address is a multiple of 64, and of the page from kSmallMax on.
  // Throws HostOutOfMemoryError when the budget or the machine does not allow it, ConfigError for
  // 0.
  HostBuffer allocate(size_t size_bytes);

  // Pins so many bytes more, whole pages, for buffers to come; see Note [Memory pinned ahead].
  // Blocks: on the calling thread progress, if any, gets the bytes done from time to time. All or
  // nothing, also where progress throws. Throws like allocate().
  void reserve(size_t size_bytes, const std::function<void(size_t)>& progress = nullptr);

  // Unpins and unmaps what nobody uses, what was pinned ahead included; returns its bytes.
  size_t trim();

  HostStats stats() const;
  const HostPoolOptions& options() const { return options_; }

 private:
  friend class HostBuffer;
  struct Slab {
    std::byte* address;
    std::optional<HostMapping> mapping;  // Without one it is carved from a region.
    size_t slot_bytes;
    std::vector<uint32_t> free_slots;
    size_t slot_count;
  };

  explicit HostPool(const HostPoolOptions& options);
  HostBuffer allocate_large(size_t size_bytes);
  HostBuffer allocate_small(size_t size_bytes);
  HostBuffer take_slot(Slab& slab, size_t size_bytes);
  void release(std::byte* address, size_t size_bytes) noexcept;
  HostMapping map(size_t size_bytes, size_t requested_bytes);
  HostMapping make_mapping(size_t size_bytes, const std::function<size_t(std::byte*)>& touch);
  std::optional<int> numa_node();
  std::byte* carve(size_t size_bytes);
  void check_machine(size_t size_bytes, size_t requested_bytes);
  void count_reserved(std::unique_lock<std::mutex>& lock, size_t size_bytes,
                      size_t requested_bytes);
  void give_back_surplus();
  std::vector<HostMapping> take_idle(size_t wanted_bytes);
  size_t unmap(std::vector<HostMapping> victims);
  void add_used(size_t size_bytes);
  void trace_used() noexcept;
  void trace_reserved() noexcept;
  [[noreturn]] void throw_over_budget(size_t size_bytes, size_t requested_bytes) const;

  const HostPoolOptions options_;
  LazyTrack track_;

  mutable std::mutex mutex_;
  // Guarded by mutex_. Invariants: reserved = bytes of all mappings, used ones, idle ones, slabs,
  // regions and those being mapped or unmapped; used <= reserved <= limit.
  std::unordered_map<std::byte*, HostMapping> in_use_;
  HostRegions regions_;
  std::unordered_map<std::byte*, size_t> carved_;  // Blocks of regions, and their sizes.
  std::list<HostMapping> idle_;                    // Longest idle first.
  std::multimap<size_t, std::list<HostMapping>::iterator> idle_by_size_;
  std::map<std::byte*, std::unique_ptr<Slab>> slabs_;          // By address, to find a slot's slab.
  std::unordered_map<size_t, std::vector<Slab*>> open_slabs_;  // With a free slot, by slot size.
  size_t used_bytes_ = 0;
  size_t used_bytes_max_ = 0;
  size_t reserved_bytes_ = 0;
  size_t reserved_bytes_max_ = 0;
  size_t buffer_count_ = 0;
  size_t huge_page_bytes_ = 0;
  std::optional<int> used_node_;  // Of the last mapping, and what became of the wish.
  std::string numa_note_;

  std::once_flag numa_once_;
  std::optional<int> numa_node_;  // Constant once numa_once_ has passed.
};

}  // namespace spillover
