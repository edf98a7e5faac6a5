#include "allocator/pending_uses.hpp"

#include "base/error.hpp"
#include "driver/device.hpp"
#include "driver/stream.hpp"

namespace spillover {

Event PendingUses::take_event() {
  if (spare_events_.empty()) return Event(device_);
  Event event = std::move(spare_events_.back());
  spare_events_.pop_back();
  return event;
}

bool PendingUses::start(Block* block, const StreamKey& stream) {
  RecordOutcome outcome = RecordOutcome::kStreamGone;
  try {
    if (reachable_from_this_thread(stream)) {
      Event event = take_event();
      const uint64_t identity = is_per_thread_stream(stream.handle) ? 0 : stream.identity;
      outcome = event.try_record(stream.handle, identity);
      if (outcome == RecordOutcome::kRecorded) {
        queues_[stream].push_back({std::move(event), block});
        return true;
      }
      spare_events_.push_back(std::move(event));
    }
    if (outcome != RecordOutcome::kStreamGone) return false;
    synchronize_device(device_);
  } catch (const Error&) {
    // No event can be had, or the device cannot be waited for now, for example because a capture is
    // under way: the use stays deferred, so the block is not handed out. A device that has failed
    // tells so at the next poll.
    return false;
  }
  finish_use(block);
  return true;
}

void PendingUses::add(Block* block) {
  const std::vector<StreamKey> uses = std::exchange(block->uses, {});
  block->outstanding_uses = uses.size();
  for (const StreamKey& stream : uses) {
    if (!start(block, stream)) deferred_.emplace_back(block, stream);
  }
}

void PendingUses::retry_deferred() {
  if (deferred_.empty()) return;
  const auto deferred = std::exchange(deferred_, {});
  for (const auto& [block, stream] : deferred) {
    if (!start(block, stream)) deferred_.emplace_back(block, stream);
  }
}

void PendingUses::finish_use(Block* block) {
  if (--block->outstanding_uses == 0) on_complete_(block);
}

void PendingUses::finish_front(std::deque<Mark>& queue) {
  Mark mark = std::move(queue.front());
  queue.pop_front();
  spare_events_.push_back(std::move(mark.event));
  finish_use(mark.block);
}

void PendingUses::poll() {
  retry_deferred();
  for (auto position = queues_.begin(); position != queues_.end();) {
    auto& queue = position->second;
    while (!queue.empty() && queue.front().event.is_complete()) finish_front(queue);
    position = queue.empty() ? queues_.erase(position) : std::next(position);
  }
}

void PendingUses::wait() {
  retry_deferred();
  while (!queues_.empty()) {
    auto& queue = queues_.begin()->second;
    // The last event of a stream covers those before it.
    queue.back().event.synchronize();
    while (!queue.empty()) finish_front(queue);
    queues_.erase(queues_.begin());
  }
}

size_t PendingUses::count() const {
  size_t count = deferred_.size();
  for (const auto& [stream, queue] : queues_) count += queue.size();
  return count;
}

}  // namespace spillover
