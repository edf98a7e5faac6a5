// Pinned host memory under a hard byte budget.
//
// A HostPool is shared by its buffers and its users (shared_ptr); both may be used from any thread.
// allocate(), reserve() and trim() may block in the driver, and hold no lock while they do.
//
// A pool belongs to the process that made it. In a forked child its lock may be held for ever by a
// thread that is not there: calls throw StateError, and buffers that die there give nothing back.
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

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/annotated_mutex.hpp"
#include "base/fork_generation.hpp"
#include "tiers/host_mapping.hpp"
#include "tiers/host_mappings.hpp"
#include "tiers/host_regions.hpp"
#include "tiers/system_memory.hpp"
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
  // For tests: of one registration of what is pinned ahead, and what stands before /proc and /sys.
  size_t region_bytes_max = size_t{64} << 30;
  std::string system_root;
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
  // nothing, also where progress throws. Throws like allocate(), and HostOutOfMemoryError where the
  // machine runs out meanwhile (Note [Watching what is left]).
  void reserve(size_t size_bytes, const std::function<void(size_t)>& progress = nullptr);

  // Unpins and unmaps what nobody uses, what was pinned ahead included; returns its bytes.
  size_t trim();

  HostStats stats() const;
  const HostPoolOptions& options() const { return options_; }

  // Whether the equations of its parts hold; walks over all of them.
  bool is_valid() const;

 private:
  friend class HostBuffer;
  using Lock = std::unique_lock<AnnotatedMutex>;
  using Progress = std::function<void(size_t)>;

  struct Slab {
    std::byte* address;
    std::optional<HostMapping> mapping;  // Without one it is carved from a region.
    size_t slot_bytes;
    size_t slot_count;
    std::vector<uint32_t> free_slots;
  };
  // The slabs of one size of slots. open has room for all of them, so that a slab may be added to
  // it while memory is exhausted.
  struct SlotClass {
    std::vector<Slab*> open;  // With a free slot.
    size_t slab_count = 0;
  };
  using Slabs = std::map<std::byte*, std::unique_ptr<Slab>>;

  // Bytes that are counted as reserved while somebody maps them. What is not kept is given up.
  class Claim {
   public:
    // The bytes are counted already.
    Claim(HostPool& pool, size_t size_bytes)
        : pool_(pool), claimed_bytes_(size_bytes), pending_bytes_(size_bytes) {}
    ~Claim();
    Claim(const Claim&) = delete;
    Claim& operator=(const Claim&) = delete;
    // So many more pages exist: what the machine says to be available shows it.
    void note_made(size_t size_bytes);
    // So many bytes are held by the pool now; called with the mutex held.
    void keep(size_t size_bytes) noexcept;
    size_t pending_bytes() const { return pending_bytes_; }  // Called with the mutex held.

   private:
    HostPool& pool_;
    size_t claimed_bytes_;
    size_t pending_bytes_;  // Guarded by the pool's mutex.
  };

  // What may have to go for something else.
  enum class Victims { kIdle, kIdleAndAhead };

  explicit HostPool(const HostPoolOptions& options);
  bool is_of_parent() const noexcept { return fork_generation() != generation_; }
  void check_process() const;
  void check_request(size_t size_bytes) const;

  HostBuffer allocate_large(size_t size_bytes);
  HostBuffer allocate_small(size_t size_bytes);
  Slab& add_slab(std::unique_ptr<Slab>& slab);
  HostBuffer take_slot(Slab& slab, size_t size_bytes);
  void release(std::byte* address, size_t size_bytes) noexcept;
  void release_slot(std::byte* address, size_t size_bytes) noexcept;
  void remove_slab(Slabs::iterator slab) noexcept;

  HostMapping make_mapping(const Claim& claimed, size_t size_bytes, size_t requested_bytes);
  HostMapping make_region(const Claim& claimed, size_t size_bytes, size_t missing_bytes,
                          size_t requested_bytes, const Progress& progress);
  std::optional<HostMapping> make_set_aside(size_t size_bytes, Victims victims,
                                            const Progress& progress);
  HostMapping map(size_t size_bytes, PageSource source);
  HostMapping map_ordinary(size_t size_bytes, Victims victims);
  void pin(HostMapping& mapping, Victims victims);
  template <class Step>
  auto with_idle_given_back(Victims victims, Step step);
  std::optional<int> numa_node();

  HostMemoryLimit left_for(const Claim& claimed) const;
  void check_machine(const Claim& claimed, size_t size_bytes, size_t requested_bytes,
                     Victims victims);
  Claim claim(size_t size_bytes, size_t requested_bytes, Victims victims);
  void give_back_surplus();
  size_t give_back(size_t wanted_bytes, Victims victims);
  std::vector<HostMapping> take_idle(size_t wanted_bytes, Victims victims);
  size_t unmap(std::vector<HostMapping> mappings);
  void add_used(size_t size_bytes) noexcept;
  void subtract_used(size_t size_bytes) noexcept;
  void add_reserved(size_t size_bytes) noexcept;
  void subtract_reserved(size_t size_bytes) noexcept;
  [[noreturn]] void throw_over_budget(size_t size_bytes, size_t requested_bytes) const;

  const HostPoolOptions options_;
  const uint32_t generation_;
  LazyTrack track_;

  mutable AnnotatedMutex mutex_;
  std::condition_variable_any unmapped_;
  // Guarded by mutex_. Invariants: reserved = bytes of all mappings, used ones, idle ones, slabs,
  // regions and those being mapped or unmapped; used <= reserved <= limit.
  HostMappings mappings_;
  HostRegions regions_;
  Slabs slabs_;                                         // By address, to find a slot's slab.
  std::unordered_map<size_t, SlotClass> slot_classes_;  // By slot_bytes.
  size_t used_bytes_ = 0;
  size_t used_bytes_max_ = 0;
  size_t reserved_bytes_ = 0;
  size_t reserved_bytes_max_ = 0;
  size_t pending_bytes_ = 0;    // Of reserved_bytes_: claimed, and not made yet.
  size_t unmapping_bytes_ = 0;  // Of reserved_bytes_: on their way to the system.
  size_t buffer_count_ = 0;
  std::optional<int> used_node_;  // Of the last mapping, and what became of the wish.
  std::string numa_note_;

  std::once_flag numa_once_;
  // Constant once numa_once_ has passed.
  std::optional<int> numa_node_;
  std::string numa_problem_;  // Why the nearest node is not known.
};

}  // namespace spillover
