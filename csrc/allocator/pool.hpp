// The device pool: hands out blocks of device memory and keeps what is freed.
//
// One Pool a device, made at first use and leaked (see pools.hpp). Every method may be called from
// any thread and takes the pool's one mutex, under which it calls the driver: a driver call never
// calls back into the pool, and no Python lock is taken under the mutex. The mutex is released
// while the pool waits for the device.
//
// A block comes from its stream's heap, best fit first, and merges with its free neighbours when it
// comes back. A heap that has no fit grows (pool_grow.cpp): memory that is held already and known
// to be idle is used before more is taken from the driver, whichever stream it belongs to, and a
// large block is put together from idle chunks wherever they are. What that needs to know about
// other streams: Note [Frees and completion] in block.hpp, Note [Event-gated reuse] in
// pending_uses.hpp, Note [Foreign streams] in stream_key.hpp.
#pragma once

#include <array>
#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "allocator/backing.hpp"
#include "allocator/block.hpp"
#include "allocator/c_api.h"
#include "allocator/pending_uses.hpp"
#include "allocator/segment_index.hpp"

namespace spillover {

class Pool {
 public:
  // Throws ConfigError for a device that does not exist. Both the index and the pool are leaked.
  Pool(int device, SegmentIndex& index);
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // Null for size 0. May block when memory runs out. Throws DeviceOutOfMemoryError, StateError on a
  // capturing stream, DriverError.
  void* allocate(size_t size_bytes, StreamHandle stream);

  // Throws ConfigError unless pointer is the start of a live block.
  void free(void* pointer);

  // As free(), but false, with nothing done, where it would have to wait for the mutex.
  bool try_free(void* pointer);

  // Throws ConfigError unless pointer is the start of a live block.
  void record_stream(void* pointer, StreamHandle stream);

  bool is_live(const void* pointer) const;

  // The segment that holds the address. Throws ConfigError where nothing is mapped.
  AddressRange segment_of(const void* pointer) const;

  spillover_stats_t statistics() const;
  void reset_accumulated_statistics();
  void reset_peak_statistics();

  // Returns every chunk without a live block to the driver. Blocks until the device's work is
  // complete.
  void trim();

  // Share of the device's memory that the pool may hold; throws ConfigError outside 0 to 1.
  void set_memory_fraction(double fraction);
  double memory_fraction() const;

  // Lets another device use this one's memory.
  void add_peer(int device);

  size_t largest_free_bytes() const;

  void visit_segments(spillover_segment_visitor visitor, void* user) const;

  // O(blocks). Throws StateError that says which equation does not hold.
  void check_invariants() const;

  int device() const { return device_; }

 private:
  using Lock = std::unique_lock<std::mutex>;

  struct Request {
    size_t requested_bytes;
    size_t size_bytes;  // rounded to kBlockAlignment
    StreamKey stream;
    SizeClass size_class;
  };
  // Where a heap may grow from.
  enum class Source {
    kHeld,  // memory that the pool has already
    kNew,   // more from the driver, within the limit
  };
  struct Totals;

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

  // All methods below need mutex_; those that take the lock release it while they wait.
  StreamState& state_of(const StreamKey& key);
  Heap& heap_of(const Request& request);
  Block* obtain(Lock& lock, const Request& request);
  Block* take_best_fit(const Request& request);
  void split(Block* block, const Request& request);
  void activate(Block* block, const Request& request);
  Block* find_live(const void* pointer) const;
  // noexcept: bookkeeping that cannot get a few bytes of host memory stops the process, since half
  // of a merge would corrupt the pool.
  void make_free(Block* block) noexcept;
  void count_freed(Block& block);
  void absorb_next(Block* block);
  void insert_free(Block* block);
  void remove_free(Block* block);
  Block* make_block(Heap& heap, const AddressRange& range, uint64_t freed_at);
  void erase_block(Block* block);

  // pool_grow.cpp
  Block* grow(const Request& request, Source source);
  Block* grow_virtual(const Request& request, Source source);
  Block* grow_fixed(const Request& request);
  size_t generous_growth(const Heap& heap, size_t missing_bytes) const;
  Block* find_tail(const Heap& heap) const;
  Block* steal(const Request& request);
  Block* steal_from(Heap& victim, const Request& request);
  bool prove_idle(StreamState& stream);
  size_t gather_idle(size_t wanted_bytes, const Block* kept);
  size_t evict(Heap& heap, size_t wanted_bytes, const Block* kept);
  void unmap(Block* block, const AddressRange& chunks);
  void carve(Block* block, const AddressRange& chunks);
  Block* adopt(Heap& heap, const AddressRange& range, uint64_t freed_at);
  Block* last_block_before(const Heap& heap, DeviceAddress address) const;
  size_t room_bytes() const;
  void count_memory();

  // pool_ladder.cpp
  Block* obtain_by_waiting(Lock& lock, const Request& request);
  Block* poll_until_fit(Lock& lock, const Request& request);
  bool mark_streams();
  size_t foreign_bytes() const;
  void wait_for_device(Lock& lock);
  void release_idle();
  [[noreturn]] void throw_out_of_memory(const Request& request);

  size_t limit_bytes() const;
  size_t largest_free() const;
  const Block* check_segment(const Block* first, Totals& totals) const;
  void check_streams(const Totals& totals) const;
  void check_totals(const Totals& totals) const;

  // Constant after construction.
  const int device_;
  const size_t device_bytes_;

  mutable std::mutex mutex_;
  // Guarded by mutex_.
  Backing backing_;
  std::unordered_map<DeviceAddress, std::unique_ptr<Block>> blocks_;
  std::map<DeviceAddress, Block*> segments_;  // The first block of each.
  std::map<StreamKey, StreamState> streams_;
  PendingUses pending_;
  std::array<size_t, 2> mapped_bytes_{};    // By SizeClass.
  std::array<size_t, 2> segment_counts_{};  // By SizeClass.
  spillover_stats_t statistics_{};
  double memory_fraction_ = 1.0;
};

}  // namespace spillover
