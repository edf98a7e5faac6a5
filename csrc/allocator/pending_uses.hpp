// Freed blocks that other streams may still use, and the events that tell when they are done.
//
// Note [Event-gated reuse]. A block that was noted on other streams (record_stream) may be handed
// out again only after those streams' work up to the *free* is complete. So at the free an event is
// recorded on each noted stream and the block waits for all of them. Events of one stream complete
// in order, so each stream has a queue and only its front is asked.
//   - A noted stream that was destroyed takes no event any more, though its work may still run: the
//     device is waited for instead.
//   - A capturing stream must not get an event of ours (it would become a part of the graph): the
//   use
//     is deferred, and tried again at each poll.
//
// Owned by one Pool and guarded by its mutex, under which it calls the driver.
#pragma once

#include <cstddef>
#include <deque>
#include <functional>
#include <map>
#include <utility>
#include <vector>

#include "allocator/block.hpp"
#include "driver/event.hpp"

namespace spillover {

class PendingUses {
 public:
  // Receives a block when its last use is complete. It must not call back into this object.
  using OnComplete = std::function<void(Block*)>;

  PendingUses(int device, OnComplete on_complete)
      : device_(device), on_complete_(std::move(on_complete)) {}

  // Takes over the block's uses. The block may be complete before this returns.
  void add(Block* block);

  // Hands over the blocks that are known to be complete. Does not block unless a deferred use's
  // stream was destroyed. Throws DriverError when the device has failed; what was handed over stays
  // so.
  void poll();

  // Blocks until every use is complete but those deferred for a capture.
  void wait();

  bool empty() const { return queues_.empty() && deferred_.empty(); }

  // Number of uses that are not complete, for the invariants.
  size_t count() const;

 private:
  struct Mark {
    Event event;
    Block* block;
  };

  Event take_event();
  // False when the use must be tried again later.
  bool start(Block* block, const StreamKey& stream);
  void retry_deferred();
  void finish_use(Block* block);
  void finish_front(std::deque<Mark>& queue);

  const int device_;
  const OnComplete on_complete_;
  std::map<StreamKey, std::deque<Mark>> queues_;  // No queue is empty between calls.
  std::vector<std::pair<Block*, StreamKey>> deferred_;
  std::vector<Event> spare_events_;
};

}  // namespace spillover
