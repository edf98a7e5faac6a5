#include "allocator/pending_uses.hpp"

#include <algorithm>
#include <atomic>

#include "allocator/expect.hpp"
#include "base/error.hpp"
#include "driver/context.hpp"
#include "driver/stream.hpp"

namespace spillover {
namespace {

std::atomic<bool> reuses{false};

// Where a stream on which a block is used is in the block's own capture, if it is there.
std::optional<CapturePosition> position_of(const DeviceStream& stream, const Block& block) {
  if (block.capture == 0) return std::nullopt;
  try {
    const ContextScope scope(stream.device);
    auto position = capture_position(stream.key.handle);
    if (position && position->capture == block.capture) return position;
  } catch (const Error&) {
    // No context: the use waits like any other that has no mark.
  }
  return std::nullopt;
}

}  // namespace

void PendingUses::set_reuses_in_capture(bool value) {
  reuses = value;
}

bool PendingUses::reuses_in_capture() {
  return reuses.load(std::memory_order_relaxed);
}

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
    if (!may_be_asked(stream.device, stream.key)) {
      unmarked_.push_back({stream, use, std::nullopt});
    } else if (!try_mark(stream, use)) {
      unmarked_.push_back({stream, use, position_of(stream, *block)});
    }
  }
}

void PendingUses::mark(const DeviceStream& stream) {
  std::erase_if(unmarked_, [&](const UnmarkedUse& entry) {
    return entry.stream == stream && try_mark(stream, entry.use);
  });
}

void PendingUses::complete_captured(const StreamKey& stream) {
  const auto is_candidate = [&](const UnmarkedUse& entry) {
    return entry.position && entry.use.block->heap->stream->key == stream;
  };
  if (std::none_of(unmarked_.begin(), unmarked_.end(), is_candidate)) return;
  const auto position = capture_position(stream.handle);
  if (!position) return;
  const std::set<GraphNode> before = nodes_before(*position);
  std::erase_if(unmarked_, [&](const UnmarkedUse& entry) {
    if (!is_candidate(entry) || entry.position->capture != position->capture) return false;
    const auto& nodes = entry.position->nodes;
    if (!std::all_of(nodes.begin(), nodes.end(),
                     [&](GraphNode node) { return before.count(node) != 0; })) {
      return false;
    }
    finish(entry.use.block);
    return true;
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
  std::erase_if(unmarked_, [&](const UnmarkedUse& entry) {
    return may_be_asked(entry.stream.device, entry.stream.key) && try_mark(entry.stream, entry.use);
  });
  for (auto position = queues_.begin(); position != queues_.end();) {
    auto& queue = position->second;
    while (!queue.empty() && queue.front().event.is_complete()) finish_front(queue);
    position = queue.empty() ? queues_.erase(position) : std::next(position);
  }
}

void PendingUses::complete(uint64_t number) {
  std::erase_if(unmarked_, [&](const UnmarkedUse& entry) {
    if (entry.use.number > number) return false;
    finish(entry.use.block);
    return true;
  });
}

std::set<int> PendingUses::devices() const {
  std::set<int> devices;
  for (const auto& [stream, queue] : queues_) devices.insert(stream.device);
  for (const UnmarkedUse& entry : unmarked_) devices.insert(entry.stream.device);
  return devices;
}

std::map<const Block*, size_t> PendingUses::count_by_block() const {
  std::map<const Block*, size_t> counts;
  for (const UnmarkedUse& entry : unmarked_) ++counts[entry.use.block];
  for (const auto& [stream, queue] : queues_) {
    expect(!queue.empty(), "a stream's queue of pending uses is empty");
    for (const MarkedUse& marked : queue) ++counts[marked.use.block];
  }
  return counts;
}

}  // namespace spillover
