// The device pool: hands out blocks of device memory and keeps what is freed for the same stream.
//
// One Pool a device, made at first use and leaked (see pools.hpp). Every method may be called from
// any thread and takes the pool's one mutex, under which it calls the driver: a driver call never
// calls back into the pool, and no Python lock is taken under the mutex.
//
// A block is cut from a segment that belongs to one stream, best fit first, and merges with its
// free neighbours when it comes back. On its own stream it is reused at once, since that stream's
// work is ordered; for other streams see Note [Event-gated reuse] in pending_uses.hpp. Segments
// without a live block go back to the driver when memory runs out and at trim().
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

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

  // Throws ConfigError unless pointer is the start of a live block. Null is allowed.
  void free(void* pointer);

  // As free(), but false, with nothing done, where it would have to wait: for the mutex, whose
  // holder may wait for the device, or for a stream that was noted and is gone.
  bool try_free(void* pointer);

  // Throws ConfigError unless pointer is the start of a live block.
  void record_stream(void* pointer, StreamHandle stream);

  bool is_live(const void* pointer) const;

  spillover_stats_t statistics() const;
  void reset_accumulated_statistics();
  void reset_peak_statistics();

  // Returns every segment without a live block to the driver. Blocks until freed blocks' streams
  // are done with them.
  void trim();

  // Share of the device's memory that the pool may hold; throws ConfigError outside 0 to 1.
  void set_memory_fraction(double fraction);
  double memory_fraction() const;

  size_t largest_free_bytes() const;

  void visit_segments(spillover_segment_visitor visitor, void* user) const;

  // O(blocks). Throws StateError that says which equation does not hold.
  void check_invariants() const;

  int device() const { return device_; }

 private:
  struct Request {
    size_t requested_bytes;
    size_t size_bytes;  // rounded to kBlockAlignment
    StreamKey stream;
    SizeClass size_class;
  };
  using FreeSet = std::set<Block*, BySizeThenAddress>;
  using BinKey = std::pair<StreamKey, SizeClass>;
  struct Totals;

  // All methods below need mutex_.
  Block* obtain(const Request& request);
  Block* take_best_fit(const Request& request);
  Block* grow(const Request& request, size_t segment_bytes);
  void split(Block* block, const Request& request);
  void activate(Block* block, const Request& request);
  Block* find_live(const void* pointer) const;
  // noexcept: bookkeeping that cannot get a few bytes of host memory stops the process, since half
  // of a merge would corrupt the pool.
  void make_free(Block* block) noexcept;
  void count_freed(const Block& block);
  void absorb_next(Block* block);
  void release_free_segments();
  [[noreturn]] void throw_out_of_memory(const Request& request);
  size_t limit_bytes() const;
  void check_segment(const Segment& segment, Totals& totals) const;
  void check_totals(const Totals& totals) const;

  // Constant after construction.
  const int device_;
  const size_t device_bytes_;
  SegmentIndex& index_;

  mutable std::mutex mutex_;
  // Guarded by mutex_.
  std::unordered_map<DeviceAddress, std::unique_ptr<Block>> blocks_;
  std::map<DeviceAddress, std::unique_ptr<Segment>> segments_;
  std::map<BinKey, FreeSet> bins_;  // No bin is empty between calls.
  PendingUses pending_;
  spillover_stats_t statistics_{};
  double memory_fraction_ = 1.0;
};

}  // namespace spillover
