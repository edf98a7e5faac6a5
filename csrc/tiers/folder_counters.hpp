// What the requests of one folder of a disk store have come to, each direction apart, and the trace
// of them.
//
// Thread-safe; the mutex is a leaf, held over nothing that waits.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>

#include "tiers/transfer_progress.hpp"
#include "trace/tracks.hpp"

namespace spillover {

// Extents that go one way. Times are sums over extents unless they say otherwise.
struct DiskDirectionStats {
  uint64_t bytes;            // Moved, of extents that went well.
  uint64_t extents;          // That are over, well or not.
  uint64_t errors;           // Of them those that failed.
  uint64_t resubmits;        // Transfers taken up again after a short or interrupted one.
  uint64_t queue_depth;      // Extents that the folder's engine has, waiting or moving, now
  uint64_t queue_depth_max;  // and at most.
  double busy_s;             // Of the clock, while it had any.
  double queued_s;           // From the engine's queue to the first transfer.
  double moving_s;           // From there to the end, checksums and all.
  double checksum_s;         // Of the processor, within moving_s.
  double submitting_s;       // Handing extents over: long where the queue is full.
};

// What becomes of an extent, for the counters. Whoever has the extent writes to it.
struct ExtentNotes {
  int64_t requested_ns = 0;  // The store got the request;
  int64_t submitted_ns = 0;  // its gate was open, and the engine was to have it;
  int64_t begun_ns = 0;      // the engine began it, 0 where it never did.
  int64_t checksum_ns = 0;
  uint32_t resubmits = 0;
  uint32_t flow_id = 0;  // The arrow that leads to it in the trace; 0 for none.
};

class FolderCounters {
 public:
  explicit FolderCounters(const std::string& folder);

  // The engine is to have the extent; notes.submitted_ns is set.
  void begin(TransferDirection direction, const ExtentNotes& notes) noexcept;
  // It was handed over; the requester waited that long.
  void add_submitting(TransferDirection direction, int64_t nanoseconds) noexcept;
  // It is over. Recorded where somebody traces.
  void end(TransferDirection direction, const ExtentNotes& notes, size_t size_bytes,
           bool has_failed) noexcept;

  DiskDirectionStats stats(TransferDirection direction) const;

 private:
  struct Direction {
    LazyTrack spans;
    LazyTrack depth;
    // Guarded by mutex_.
    uint64_t bytes = 0;
    uint64_t extents = 0;
    uint64_t errors = 0;
    uint64_t resubmits = 0;
    uint64_t queue_depth = 0;
    uint64_t queue_depth_max = 0;
    int64_t busy_since_ns = 0;
    int64_t busy_ns = 0;
    int64_t queued_ns = 0;
    int64_t moving_ns = 0;
    int64_t checksum_ns = 0;
    int64_t submitting_ns = 0;
  };

  static size_t index_of(TransferDirection direction) {
    return direction == TransferDirection::kWrite ? 0 : 1;
  }

  mutable std::mutex mutex_;
  std::array<Direction, 2> directions_;
};

}  // namespace spillover
