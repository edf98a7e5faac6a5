#include "allocator/pending_uses.hpp"

#include <algorithm>

#include "allocator/expect.hpp"
#include "base/error.hpp"
#include "driver/stream.hpp"

namespace spillover {

bool PendingUses::try_mark(const DeviceStream& stream, const Use& use) {
  try {
    Event event = spare_events_.take(stream.device);
    const bool is_recorded = event.try_record(stream.key.handle) == RecordOutcome::kRecorded;
    if (is_recorded) {
      queues_[stream].push_back({std::move(event), use});
    } else {
      spare_events_.give(std::move(event));
    }
    return is_recorded;
  } catch (const Error&) {
    // No event can be had: the use stays unmarked, so the block is not handed out. A device that
    // has failed tells so at the next poll.
    return false;
  }
}

void PendingUses::add(Block* block) {
  const std::vector<DeviceStream> uses = std::exchange(block->uses, {});
  block->outstanding_uses = uses.size();
  for (const DeviceStream& stream : uses) {
    const Use use{block, ++latest_};
    if (!may_be_asked(stream.device, stream.key) || !try_mark(stream, use)) {
      unmarked_.emplace_back(stream, use);
    }
  }
}

void PendingUses::mark(const DeviceStream& stream) {
  std::erase_if(unmarked_, [&](const std::pair<DeviceStream, Use>& entry) {
    return entry.first == stream && try_mark(stream, entry.second);
  });
}

void PendingUses::finish(Block* block) {
  if (--block->outstanding_uses == 0) on_complete_(block);
}

void PendingUses::finish_front(std::deque<MarkedUse>& queue) {
  MarkedUse front = std::move(queue.front());
  queue.pop_front();
  spare_events_.give(std::move(front.event));
  finish(front.use.block);
}

void PendingUses::poll() {
  std::erase_if(unmarked_, [&](const std::pair<DeviceStream, Use>& entry) {
    return may_be_asked(entry.first.device, entry.first.key) && try_mark(entry.first, entry.second);
  });
  for (auto position = queues_.begin(); position != queues_.end();) {
    auto& queue = position->second;
    while (!queue.empty() && queue.front().event.is_complete()) finish_front(queue);
    position = queue.empty() ? queues_.erase(position) : std::next(position);
  }
}

void PendingUses::complete(uint64_t number) {
  std::erase_if(unmarked_, [&](const std::pair<DeviceStream, Use>& entry) {
    if (entry.second.number > number) return false;
    finish(entry.second.block);
    return true;
  });
}

std::set<int> PendingUses::devices() const {
  std::set<int> devices;
  for (const auto& [stream, queue] : queues_) devices.insert(stream.device);
  for (const auto& [stream, use] : unmarked_) devices.insert(stream.device);
  return devices;
}

std::map<const Block*, size_t> PendingUses::count_by_block() const {
  std::map<const Block*, size_t> counts;
  for (const auto& [stream, use] : unmarked_) ++counts[use.block];
  for (const auto& [stream, queue] : queues_) {
    expect(!queue.empty(), "a stream's queue of pending uses is empty");
    for (const MarkedUse& marked : queue) ++counts[marked.use.block];
  }
  return counts;
}

}  // namespace spillover
