// Freed blocks that other streams may still use, and the events that tell when they are done.
//
// Note [Event-gated reuse]. A block that was noted on other streams (record_stream) may be handed
// out again only after those streams' work up to the *free* is complete. So at the free an event is
// recorded on each noted stream and the block waits for all of them. Events of one stream complete
// in order, so each stream has a queue and only its front is asked.
//   - A foreign stream may be gone by then (Note [Foreign streams]): the use is *unmarked* until
//   the
//     stream is passed to the pool once more, or its whole device was waited for.
//   - A capturing stream must not get an event of ours (it would become a part of the graph): the
//     use stays unmarked, and is tried again at each poll.
//
// Note [Reuse in a capture]. Where the user wants it (torch's graph_capture_record_stream_reuse),
// the graph that is recorded tells of such a use: at the free it is known which nodes the noted
// stream has recorded, and once the block's own stream waits for all of them, work that it records
// from then on is ordered behind the use at each launch. Only blocks that were handed out in this
// very capture: others may have uses that are no part of the graph.
//
// Owned by one Pool and guarded by its mutex, under which it calls the driver.
#pragma once

#include <cstddef>
#include <deque>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "allocator/block.hpp"
#include "allocator/spare_events.hpp"
#include "driver/capture.hpp"
#include "driver/event.hpp"

namespace spillover {

class PendingUses {
 public:
  // Receives a block when its last use is complete. It must not call back into this object.
  using OnComplete = std::function<void(Block*)>;

  PendingUses(SpareEvents& spare_events, OnComplete on_complete)
      : spare_events_(spare_events), on_complete_(std::move(on_complete)) {}

  // Takes over the block's uses.
  void add(Block* block);

  // Marks the uses on a stream that is alive.
  void mark(const DeviceStream& stream);

  // Hands over the blocks of a stream that records a graph and waits in it for all of their uses.
  // O(the graph) where there are such blocks. The device's context must be current.
  void complete_captured(const StreamKey& stream);
  // Whether graphs reuse memory so; one value for every pool, which any thread may change.
  static void set_reuses_in_capture(bool value);
  static bool reuses_in_capture();

  // Hands over the blocks that are known to be complete. Does not block. Throws DriverError when
  // the device has failed; what was handed over stays so.
  void poll();

  // Number of the latest use so far, to be given to complete() after a wait for the device.
  uint64_t latest() const { return latest_; }
  // Hands over every unmarked use up to that number: devices() were waited for since.
  void complete(uint64_t number);

  bool empty() const { return queues_.empty() && unmarked_.empty(); }
  bool has_marked() const { return !queues_.empty(); }
  bool has_unmarked() const { return !unmarked_.empty(); }
  // The devices of all uses' streams.
  std::set<int> devices() const;

  // Uses that are not complete, by block, for the invariants. Throws StateError where a queue is
  // empty.
  std::map<const Block*, size_t> count_by_block() const;

 private:
  struct Use {
    Block* block;
    uint64_t number;
  };
  struct MarkedUse {
    Event event;
    Use use;
  };

  struct UnmarkedUse {
    DeviceStream stream;
    Use use;
    std::optional<CapturePosition> position;  // Of the stream, at the free.
  };

  // False when the use must be tried again later.
  bool try_mark(const DeviceStream& stream, const Use& use);
  void finish(Block* block);
  void finish_front(std::deque<MarkedUse>& queue);

  SpareEvents& spare_events_;
  const OnComplete on_complete_;
  uint64_t latest_ = 0;
  std::map<DeviceStream, std::deque<MarkedUse>> queues_;  // No queue is empty between calls.
  std::vector<UnmarkedUse> unmarked_;
};

}  // namespace spillover
