// The device pool: hands out blocks of device memory and keeps what is freed.
//
// One Pool a device, made at first use and leaked (see pools.hpp). Every method may be called from
// any thread. Most allocations and frees take no lock but their thread's own (Note [Magazines] in
// magazine.hpp); everything else takes the pool's one mutex, under which it calls the driver: a
// driver call never calls back into the pool, and no Python lock is taken under the mutex. The
// mutex is released while the pool waits for the device.
//
// Otherwise a block comes from its stream's heap, best fit first, and merges with its free
// neighbours when it comes back. A heap that has no fit grows (pool_grow.cpp): memory that is held
// already and known to be idle is used before more is taken from the driver, whichever stream it
// belongs to, and a large block is put together from idle chunks wherever they are. What that needs
// to know about other streams: Note [Frees and completion] in block.hpp, Note [Watermarks] in
// pool_watermarks.cpp, Note [Event-gated reuse] in pending_uses.hpp, Note [Foreign streams] in
// stream_key.hpp.
#pragma once

#include <array>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "allocator/backing.hpp"
#include "allocator/block.hpp"
#include "allocator/block_store.hpp"
#include "allocator/c_api.h"
#include "allocator/content_store.hpp"
#include "allocator/magazine.hpp"
#include "allocator/out_of_memory.hpp"
#include "allocator/pending_uses.hpp"
#include "allocator/reclaimers.hpp"
#include "allocator/settings.hpp"
#include "allocator/shared_memory.hpp"
#include "allocator/spare_events.hpp"
#include "allocator/upstream.hpp"
#include "base/annotated_mutex.hpp"

namespace spillover {

struct ArenaOptions {
  bool lends = false;     // Its free blocks serve requests that would fail otherwise.
  bool is_whole = false;  // Each block is a segment of its own; see Note [Whole blocks].
};

class Pool {
 public:
  // Throws ConfigError for a device that does not exist or has not what the settings ask for.
  Pool(int device, const Settings& settings);
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // Null for size 0. May block when memory runs out. Throws DeviceOutOfMemoryError, StateError on a
  // capturing stream, DriverError.
  void* allocate(size_t size_bytes, StreamHandle stream);

  // The same from a private arena, also on a capturing stream. Throws ConfigError for an arena that
  // is not in use.
  void* allocate_in(ArenaId arena, size_t size_bytes, StreamHandle stream);

  // The same at an address, of what is free there for the stream and the arena; for kDefaultArena
  // the thread's tag. Throws StateError where that is not to be had. Never blocks.
  void* allocate_at(void* pointer, ArenaId arena, size_t size_bytes, StreamHandle stream);

  // The same from the thread's magazine; null where that has no such block. Never blocks.
  // The caller knows that the stream records no graph.
  void* allocate_cached(size_t size_bytes, StreamHandle stream) noexcept;

  // Throws ConfigError unless pointer is the start of a live block.
  void free(void* pointer);

  // Puts a live block of any pool into the thread's magazine; false, with nothing done, where it
  // has no room or the pointer is no live block. Never blocks.
  static bool free_to_magazine(void* pointer) noexcept;

  // As free(), but false, with nothing done, where it would have to wait for the mutex.
  bool try_free(void* pointer);

  // Throws ConfigError unless pointer is the start of a live block. A default stream is this
  // device's, or else stream_device's.
  void record_stream(void* pointer, StreamHandle stream);
  void record_stream(void* pointer, int stream_device, StreamHandle stream);

  bool is_live(const void* pointer) const;

  // Throws ConfigError unless pointer is the start of a live block.
  ArenaId arena_of_block(const void* pointer) const;

  // The segment that holds the address. Throws ConfigError where nothing is mapped.
  AddressRange segment_of(const void* pointer) const;

  spillover_stats_t statistics();
  void reset_accumulated_statistics();
  void reset_peak_statistics();
  spillover_interval take_interval();

  // Returns chunks without a live block to the driver until the pool holds at most keep_bytes.
  // Blocks until the device's work is complete.
  void trim(size_t keep_bytes);

  // Throws StateError for what cannot change any more.
  void require_changeable(const Settings& settings) const;
  // As require_changeable(), then takes the settings over. Idle memory above a new limit goes to
  // the driver at once; where that throws DriverError the former settings hold, and what went is
  // gone.
  void configure(const Settings& settings);
  // Takes former settings back, and gives no memory away.
  void restore_settings(const Settings& settings) noexcept;
  Settings settings() const;
  // What the pool may hold by its settings; Settings::kNoLimit without a limit.
  size_t limit_bytes() const;

  Reclaimers& reclaimers() { return reclaimers_; }

  spillover_tag_stats_t arena_statistics(ArenaId arena);

  // Private arenas (Note [Private arenas] in pool_arenas.cpp). All but the first throw ConfigError
  // for an arena that is not in use, trim_arena for one that never was.
  ArenaId make_arena();
  // The stream, which lives, is going to ask for the arena's memory; see captures().
  void expect_stream(ArenaId arena, StreamHandle stream);
  // One whose memory comes from elsewhere (Note [Upstreams] in pool_upstream.cpp).
  ArenaId make_arena(std::shared_ptr<const Upstream> upstream);
  void release_arena(ArenaId arena);
  // Throws StateError where is_whole changes and the arena has memory.
  void set_arena_options(ArenaId arena, const ArenaOptions& options);
  // Frees the arena's live blocks and makes those that are given, which were live at one time in
  // this arena, live again. Throws StateError, with nothing done, where that cannot be.
  void restore_arena(ArenaId arena, std::vector<spillover_block_info> blocks);
  // Returns a released arena's idle memory to the driver. Blocks until the device's work is
  // complete.
  void trim_arena(ArenaId arena);

  // Sleep (Note [Sleep] in pool_sleep.cpp): the memory of tags goes to the driver, and comes back
  // at the same addresses. Both give the bytes that were copied, do nothing for tags that are so
  // already, and block until the device has done everything that was submitted, and the copies.
  // Each is done for all tags or, where it throws, for none.
  //
  // A null store discards the contents. Throws StateError while a graph is being recorded, where a
  // live block is shared with other processes or another thread does the same to one of the tags,
  // ConfigError without virtual memory, DriverError and what the store throws.
  size_t sleep(const std::vector<ArenaId>& tags, ContentStore* store);
  // Throws DeviceOutOfMemoryError, StateError, DriverError and what the store throws.
  size_t wake(const std::vector<ArenaId>& tags);
  std::vector<ArenaId> sleeping_tags() const;

  // Lets another device use this one's memory.
  void add_peer(int device);
  // The devices that may; this one first.
  std::vector<int> devices() const;

  // A live block's memory for other processes, see Note [Shared memory]. Throws ConfigError unless
  // pointer is the start of a live block, StateError where the driver cannot share it, DriverError.
  SharedBlock share(const void* pointer);

  size_t largest_free_bytes();

  void visit_segments(spillover_segment_visitor visitor, void* user);

  // Of every pool; null for nobody. See c_api.h.
  static void observe_segments(spillover_segment_observer observer) noexcept;

  // O(blocks). Throws StateError that says which equation does not hold.
  void check_invariants();

  // Takes back what a thread that ends has kept.
  void retire(ThreadCache& cache, MagazineSlot& slot);

  int device() const { return device_; }

 private:
  using Lock = std::unique_lock<AnnotatedMutex>;

  struct Request {
    size_t requested_bytes;
    size_t size_bytes;  // rounded: size_rounding.hpp
    StreamKey stream;
    ArenaId arena;
    SizeClass size_class;
    bool is_captured = false;  // The stream records a graph.
    bool is_whole = false;     // The block has chunks of its own.
    uint64_t capture = 0;      // Which, where graphs reuse what streams were noted on.
  };
  // The arenas of one stream are neighbours.
  using StreamStates = std::map<std::pair<StreamKey, ArenaId>, StreamState>;
  // Where a heap may grow from.
  enum class Source {
    kHeld,  // memory that the pool has already, and a little more in place of moving it
    kNew,   // more from the driver, within the limit
  };
  // Addresses for a request that begin with a free block, over gaps that chunks are mapped into.
  struct Window {
    Block* first = nullptr;  // Null: there is none, the request needs addresses of its own.
    AddressRange range;
    size_t missing_bytes = 0;  // What is to be mapped.
  };
  // What becomes of memory at the addresses of a segment.
  enum class SegmentChange { kMapped, kGoing };
  // Whether chunks may be taken that are much larger than what is wanted.
  enum class Overshoot { kBounded, kAny };
  struct Totals;
  // Whole chunks within a free block.
  struct Run {
    Block* block;
    AddressRange chunks;
  };

  struct ArenaUsage {
    size_t mapped_bytes = 0;  // Of its segments, those too that sleep.
    size_t mapped_bytes_peak = 0;
    size_t asleep_bytes = 0;
  };

  // What is known of a tag that sleeps, or is on the way there or back.
  struct Sleeping {
    enum class Phase {
      kFallingAsleep,
      kAsleep,
      kWaking,
    };

    Phase phase = Phase::kFallingAsleep;
    std::vector<ContentPiece> pieces;
    std::vector<size_t> live_bytes;           // Of each piece: what is of live blocks.
    std::unique_ptr<SavedContents> contents;  // Null where nothing is kept elsewhere.
    std::vector<AddressRange> provided;       // While it wakes.
  };
  // What is to be copied, and the chunks that are mapped before, or unmapped after, each piece.
  struct SleepPlan {
    std::vector<ContentPiece> pieces;
    std::vector<std::vector<AddressRange>> chunks;  // By piece.
    std::vector<AddressRange> empty_chunks;         // Without contents.
  };
  // A part of a live block and the piece that it is in.
  struct SavedRange {
    DeviceAddress begin;
    DeviceAddress end;
    size_t piece;
  };

  // Releases the mutex while it lives.
  class Unlocked {
   public:
    explicit Unlocked(Lock& lock) : lock_(lock) { lock_.unlock(); }
    ~Unlocked() { lock_.lock(); }
    Unlocked(const Unlocked&) = delete;
    Unlocked& operator=(const Unlocked&) = delete;

   private:
    Lock& lock_;
  };

  struct MagazineReference {
    ThreadCache* cache;
    MagazineSlot* slot;
  };

  // Keeps every thread's magazines still, and empty where a walk is to find each block in its heap.
  class StillMagazines {
   public:
    enum class Contents { kReturned, kLeft };

    explicit StillMagazines(Pool& pool, Contents contents = Contents::kReturned);
    ~StillMagazines();
    StillMagazines(const StillMagazines&) = delete;
    StillMagazines& operator=(const StillMagazines&) = delete;

   private:
    std::vector<ThreadCache*> caches_;  // locked
  };

  // Whatever becomes of a change to what is mapped, the counters follow it.
  class CountOnExit {
   public:
    explicit CountOnExit(Pool& pool) : pool_(pool) {}
    ~CountOnExit() { pool_.count_memory(); }
    CountOnExit(const CountOnExit&) = delete;
    CountOnExit& operator=(const CountOnExit&) = delete;

   private:
    Pool& pool_;
  };

  Request make_request(size_t size_bytes, StreamHandle stream, ArenaId arena) const;

  // All methods below need mutex_; those that take the lock release it while they wait.
  void* serve(Lock& lock, const Request& request);
  StreamState& state_of(const StreamKey& key, ArenaId arena);
  Heap& heap_of(const Request& request);
  Block* live_block(const void* pointer) const;
  void free_slowly(void* pointer);
  Block* obtain(Lock& lock, const Request& request);
  Block* take_best_fit(const Request& request);
  void split(Block* block, const Request& request);
  void activate(Block* block, const Request& request);
  // noexcept: bookkeeping that cannot get a few bytes of host memory stops the process, since half
  // of a merge would corrupt the pool.
  void make_free(Block* block) noexcept;
  void merge_free(Block* block) noexcept;
  void count_freed(Block& block);
  void absorb_next(Block* block);
  void insert_free(Block* block);
  void remove_free(Block* block);
  Block* make_block(Heap& heap, const AddressRange& range, uint64_t freed_at);
  void erase_block(Block* block);

  // pool_magazines.cpp; free_cached takes no mutex.
  static bool free_cached(Block* block) noexcept;
  MagazineSlot* equip(StreamState& stream);
  void return_cached(const std::vector<Block*>& blocks);
  void empty_large(const StreamState& stream);
  void empty(ThreadCache& cache, MagazineSlot& slot);
  size_t empty_magazines();
  void take_over_counters();
  void take_over(ThreadCounters& counters);
  void raise_peaks();
  int64_t largest_of_others(const ThreadCounters* own, size_t metric, size_t size_class) const;
  spillover_stats_t totals() const;

  // pool_arenas.cpp
  ArenaOptions& private_arena(ArenaId arena);
  bool may_ask(const StreamState& stream) const;
  bool captures() const;
  Block* borrow(const Request& request);
  void forget_empty();

  // pool_upstream.cpp
  Block* obtain_from_upstream(Lock& lock, const Request& request);
  Block* take_from_upstream(Lock& lock, const Request& request, size_t size_bytes);
  std::string defect_of(DeviceAddress begin, DeviceAddress end) const;
  bool holds_any_of(DeviceAddress begin, DeviceAddress end) const;
  void evict_upstreams();
  void return_to_upstreams(Lock& lock);

  // pool_sleep.cpp
  ArenaId tag_of(ArenaId arena) const;
  bool is_asleep(ArenaId arena) const;
  void check_awake(ArenaId arena) const;
  void set_asleep(ArenaId tag, bool is_asleep);
  std::vector<AddressRange> segments_of(ArenaId tag) const;
  void check_not_shared(const std::vector<ArenaId>& tags) const;
  void begin_sleep(Lock& lock, const std::vector<ArenaId>& tags);
  size_t copy_out(Lock& lock, Sleeping& sleeping, const SleepPlan& plan, ContentStore* store);
  std::vector<PhysicalMemory> end_sleep(ArenaId tag, const SleepPlan& plan);
  std::vector<ArenaId> undo_sleep(Lock& lock, const std::vector<ArenaId>& tags);
  void give_up_contents(Block& block);
  void count_sleeping(ArenaId tag, spillover_tag_stats_t& statistics) const;
  void count_asleep(const AddressRange& chunks, bool is_asleep);
  void detach(const AddressRange& chunks);
  void attach(const AddressRange& range);
  // pool_wake.cpp
  void drop_freed(ArenaId tag);
  size_t copy_in(Lock& lock, ArenaId tag);
  void provide(Lock& lock, ArenaId tag, const AddressRange& chunks);
  bool provide_from_idle(const AddressRange& chunks);
  bool provide_by_waiting(Lock& lock, const AddressRange& chunks);
  [[noreturn]] void throw_cannot_wake(ArenaId tag);
  void undo_wake(Lock& lock, const std::vector<ArenaId>& tags) noexcept;
  // pool_sleep_plan.cpp
  std::vector<AddressRange> live_ranges(ArenaId tag) const;
  SleepPlan plan_sleep(ArenaId tag, bool is_kept) const;
  SleepPlan plan_wake(ArenaId tag) const;
  void assign_chunks(ArenaId tag, const std::vector<SavedRange>& saved, bool is_by_first,
                     SleepPlan& plan) const;

  // pool_restore.cpp
  std::vector<Block*> live_blocks(ArenaId arena) const;
  void check_restorable(ArenaId arena, const std::vector<spillover_block_info>& blocks,
                        const std::vector<Block*>& live) const;
  Block* block_at(DeviceAddress address) const;
  void restore(const spillover_block_info& wanted);
  void cut_out(Block* block, DeviceAddress address, const Request& request);

  // pool_grow.cpp
  Block* grow(const Request& request, Source source);
  Block* grow_virtual(const Request& request, Source source, size_t spare_bytes);
  size_t preferred_fixed_bytes(const Request& request) const;
  Block* grow_fixed(const Request& request);
  size_t used_bytes() const;
  size_t spare_bytes(size_t used_bytes_peak) const;
  size_t generous_growth(const Heap& heap, size_t missing_bytes) const;
  Window find_window(const Heap& heap, size_t size_bytes) const;
  size_t missing_behind(const Block& first, size_t size_bytes) const;
  Block* map_behind(Heap& heap, DeviceAddress address, size_t size_bytes, size_t held_max);
  Block* steal(const Request& request);
  Block* steal_from(Heap& victim, const Request& request);
  std::optional<Run> find_run(const Heap& victim, const Request& request,
                              uint64_t completed_count) const;
  bool prove_idle(StreamState& stream);
  size_t gather_idle(size_t wanted_bytes, const AddressRange& kept, Overshoot overshoot);
  size_t evict(Heap& heap, size_t wanted_bytes, const AddressRange& kept, Overshoot overshoot);
  void unmap(Block* block, const AddressRange& chunks);
  void carve(Block* block, const AddressRange& chunks);
  Block* adopt(Heap& heap, const AddressRange& range, uint64_t freed_at);
  Block* last_block_before(const Heap& heap, DeviceAddress address) const;
  size_t room_bytes() const;
  void count_memory();

  // pool_report.cpp
  void announce(SegmentChange change, const Heap& heap, const AddressRange& range) const noexcept;
  void announce(SegmentChange change, const AddressRange& range) const noexcept;
  bool is_fixed(const StreamState& stream) const;

  // pool_share.cpp
  void close_unneeded_files();

  // pool_watermarks.cpp
  size_t watermark_bytes() const;
  void note_alive(StreamState& stream);
  void watch_streams();
  void mark_if_due(StreamState& stream, size_t threshold_bytes,
                   StreamState::MarkKind kind) noexcept;
  bool try_mark(StreamState& stream, StreamState::MarkKind kind) noexcept;
  bool mark(StreamState& stream, StreamState::MarkKind kind);
  void thin_marks(StreamState& stream);
  void collect_marks(StreamState& stream);
  void complete_frees(StreamState& stream, uint64_t freed_count);
  void note_freed(const Heap& heap, const AddressRange& range);
  std::vector<AddressRange> complete_parts(const Block& block, uint64_t completed_count) const;
  Block* take_behind_watermark(const Request& request);

  // pool_ladder.cpp
  Block* obtain_by_waiting(Lock& lock, const Request& request, LadderAttempts& attempts);
  std::optional<Block*> poll_until_fit(Lock& lock, const Request& request);
  size_t usable_bytes(const Request& request) const;
  bool mark_streams();
  size_t foreign_bytes() const;
  void wait_for_device(Lock& lock, const std::vector<int>& other_devices = {});
  Block* search_again(Lock& lock, const Request& request, LadderAttempts& attempts);
  Block* reclaim(Lock& lock, const Request& request, LadderAttempts& attempts);
  void release_idle(Lock& lock, size_t keep_bytes);
  void return_released(Lock& lock);
  [[noreturn]] void throw_out_of_memory(const Request& request, const LadderAttempts& attempts);
  std::vector<std::pair<std::string, size_t>> live_bytes_by_tag() const;

  size_t limit_by_settings() const;
  size_t largest_free() const;

  // pool_check.cpp
  void check_at_intervals() noexcept;
  void walk() const;
  const Block* check_segment(const Block* first, Totals& totals) const;
  void check_pages(const AddressRange& segment, size_t used_count, Totals& totals) const;
  void check_streams(const Totals& totals) const;
  void check_magazines(const Totals& totals) const;
  void check_thread_counters() const;
  void check_totals(const Totals& totals) const;

  // Constant after construction.
  const int device_;
  const size_t device_bytes_;

  Reclaimers reclaimers_;  // Has a lock of its own.

  mutable AnnotatedMutex mutex_;
  // Guarded by mutex_.
  Settings settings_;
  Backing backing_;
  BlockStore blocks_;
  std::map<DeviceAddress, Block*> segments_;  // The first block of each.
  StreamStates streams_;
  // At least the freed_count of every stream that was forgotten. One that comes back numbers its
  // frees from there: a thread that waits for the device since then holds the former numbers.
  uint64_t forgotten_count_ = 0;
  SpareEvents spare_events_;
  PendingUses pending_;
  size_t releases_in_flight_ = 0;  // Threads that give released chunks to the driver.
  std::condition_variable_any release_ended_;
  bool serves_several_streams_ = false;  // Or has done so.
  std::vector<MagazineReference> magazines_;
  std::vector<std::unique_ptr<ThreadCounters>> counters_;  // One a thread that has a magazine.
  std::array<size_t, 2> mapped_bytes_{};                   // By SizeClass.
  std::array<size_t, 2> asleep_bytes_{};                   // By SizeClass; a part of the former.
  std::array<size_t, 2> segment_counts_{};                 // By SizeClass.
  std::map<ArenaId, ArenaUsage> arenas_;
  std::map<ArenaId, ArenaOptions> private_arenas_;  // Those in use.
  // Of private arenas that have one, in use or not empty.
  std::map<ArenaId, std::shared_ptr<const Upstream>> upstreams_;
  std::vector<std::shared_ptr<const Upstream>> unused_upstreams_;  // To be let go of unlocked.
  size_t asked_of_upstreams_bytes_ = 0;                            // By calls that are under way.
  ArenaId next_private_arena_ = kFirstPrivateArena;
  // Of private arenas: under which they were made; with an upstream their own number.
  std::map<ArenaId, ArenaId> tags_;
  std::map<ArenaId, Sleeping> sleeping_;   // By tag.
  std::set<DeviceAddress> shared_blocks_;  // Those that share() has seen, some of them freed since.
  size_t files_needed_ = 0;                // Of chunks, after the last close_unneeded_files().
  size_t used_bytes_peak_ = 0;             // The most that was in use when a heap grew.
  spillover_stats_t statistics_{};
  int64_t earlier_peak_ = 0;      // Of allocated bytes, before take_interval() last began again.
  uint32_t unchecked_count_ = 0;  // calls since the last check
};

}  // namespace spillover
