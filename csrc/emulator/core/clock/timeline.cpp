#include "emulator/core/clock/timeline.hpp"

#include <algorithm>
#include <utility>

namespace spillover::emulator {
namespace {

// A node's progress in a nanosecond at full speed.
constexpr std::int64_t kFullRate = std::int64_t{1} << 20;

// However crowded a bandwidth is, everybody gets on.
constexpr std::int64_t kRateMin = kFullRate / 64;

// Keeps remaining below 2^63; more than two hours for a single operation.
constexpr Nanoseconds kDurationMax = Nanoseconds{1} << 42;

bool is_copy(Resource resource) {
  return resource == Resource::kCopyIn || resource == Resource::kCopyOut ||
         resource == Resource::kPeerLink;
}

bool is_of_host(Resource resource) {
  return resource >= Resource::kOptimizer;
}

// What a node asks of a bandwidth at full speed, in bytes a microsecond.
std::int64_t demand(std::uint64_t bytes, Nanoseconds duration) {
  if (duration <= 0) return 0;
  return static_cast<std::int64_t>(static_cast<double>(bytes) * 1000 /
                                   static_cast<double>(duration));
}

// The rate of those who share what is there in proportion to what they ask for.
std::int64_t share(std::int64_t available, std::int64_t wanted) {
  if (wanted <= available) return kFullRate;
  const double fraction =
      static_cast<double>(std::max<std::int64_t>(available, 0)) / static_cast<double>(wanted);
  return std::max(kRateMin, static_cast<std::int64_t>(fraction * static_cast<double>(kFullRate)));
}

std::int64_t scaled(std::int64_t wanted, std::int64_t rate) {
  return static_cast<std::int64_t>(static_cast<double>(wanted) * static_cast<double>(rate) /
                                   static_cast<double>(kFullRate));
}

}  // namespace

Timeline::Timeline(const TimelineLimits& limits, std::function<void(const Span&)> on_span)
    : limits_(limits), on_span_(std::move(on_span)) {}

Timeline::Slot Timeline::slot_of(const OperationCost& cost, int device) {
  return {cost.resource, is_of_host(cost.resource) ? 0 : device};
}

void Timeline::append(LaneId id, int device, int priority, const StreamRef& stream,
                      TimelineNode node) {
  Lane& lane = lanes_[id];
  lane.id = id;
  lane.device = device;
  lane.priority = priority;
  if (lane.pending.empty()) lane.stream = stream;
  // Nothing can start in the past, also where a thread's own time lies behind.
  node.submitted = std::max(node.submitted, now_);
  node.cost.duration = std::clamp(node.cost.duration, Nanoseconds{0}, kDurationMax);
  node.submission = ++submissions_;
  lane.launches += node.cost.shares_launch ? 0 : 1;
  lane.pending.push_back(std::move(node));
  busy_.emplace(id, &lane);
}

Nanoseconds Timeline::ready_time(const Lane& lane) const {
  const TimelineNode& front = lane.pending.front();
  const bool has_gap = lane.after_kernel && front.cost.resource == Resource::kCompute;
  return std::max(front.submitted, lane.end + (has_gap ? limits_.kernel_gap : 0));
}

bool Timeline::may_go_on(const Lane& lane) const {
  if (lane.is_running || ready_time(lane) > now_) return false;
  const TimelineNode& front = lane.pending.front();
  return front.awaited_ticket == 0 || is_done(front.awaited_lane, front.awaited_ticket);
}

void Timeline::pop(Lane* lane) {
  lane->launches -= lane->pending.front().cost.shares_launch ? 0 : 1;
  lane->pending.pop_front();
  if (!lane->pending.empty()) return;
  lane->stream = nullptr;
  busy_.erase(lane->id);
  if (lane->id >= kHostLanes) lanes_.erase(lane->id);  // its only node; nobody asks for it again
}

// Nodes that take no time: waits, marks. True where there was one.
bool Timeline::finish_marks() {
  bool found = false;
  for (auto next = busy_.begin(); next != busy_.end();) {
    Lane* const lane = (next++)->second;  // pop may remove it
    while (busy_.contains(lane->id) && may_go_on(*lane)) {
      const TimelineNode& front = lane->pending.front();
      if (front.cost.resource != Resource::kNone || front.needs_execution) break;
      if (front.awaited_ticket != 0) {
        const auto awaited = lanes_.find(front.awaited_lane);
        // What came last counts; what was done before this wait's turn delayed nothing.
        if (awaited != lanes_.end() && awaited->second.end == now_ && lane->end < now_ &&
            front.submitted < now_) {
          lane->end_origin = awaited->second.end_origin;
          lane->by_event = true;
        }
      }
      lane->end = std::max(lane->end, now_);
      if (front.mark != nullptr) *front.mark = now_;
      pop(lane);
      found = true;
    }
  }
  return found;
}

// The lane whose front node starts now, if any. Where that node must really run first, says so.
Timeline::Lane* Timeline::next_to_start(bool* needs_execution) {
  Lane* best = nullptr;
  for (const auto& [id, lane] : busy_) {
    if (!may_go_on(*lane)) continue;
    const TimelineNode& front = lane->pending.front();
    if (front.needs_execution) {
      *needs_execution = true;
      need_ = {id, front.ticket, lane->stream};
      return nullptr;
    }
    if (running_.contains(slot_of(front.cost, lane->device))) continue;
    if (best == nullptr || lane->priority < best->priority ||
        (lane->priority == best->priority && ready_time(*lane) < ready_time(*best))) {
      best = lane;
    }
  }
  return best;
}

void Timeline::start(Lane* lane) {
  TimelineNode& node = lane->pending.front();
  const Slot slot = slot_of(node.cost, lane->device);
  Running running;
  running.lane = lane;
  running.remaining = node.cost.duration * kFullRate;
  Span& span = running.span;
  span.number = next_span_++;
  span.name = node.name;
  span.lane = lane->id;
  span.resource = node.cost.resource;
  span.device = slot.second;
  span.submission = node.submission;
  span.limit = node.cost.limit;
  span.submitted = node.submitted;
  span.ready = ready_time(*lane);
  span.start = now_;
  span.bytes = std::max({node.cost.link_bytes, node.cost.device_bytes, node.cost.host_bytes});
  span.host = node.host;
  if (node.awaited_ticket != 0 && span.ready < now_) lane->by_event = true;
  if (span.ready < now_ && freed_by_[slot].span != Origin::kNoSpan && node.awaited_ticket == 0) {
    span.cause = freed_by_[slot];  // the resource was busy
  } else if (node.awaited_ticket != 0 && origin(node.awaited_lane).span != Origin::kNoSpan &&
             span.ready < now_) {
    span.cause = origin(node.awaited_lane);
    span.by_event = true;
  } else if (lane->end > node.submitted) {
    span.cause = lane->end_origin;
    span.by_event = lane->by_event;
  }
  running.node = std::move(node);
  lane->is_running = true;
  running_.emplace(slot, std::move(running));
}

void Timeline::set_rates() {
  struct Sums {
    std::int64_t copies_device = 0, copies_link = 0, copies_host = 0;
    std::int64_t device = 0, host = 0;
  };
  std::map<int, Sums> devices;
  Sums host;
  for (const auto& [slot, running] : running_) {
    const OperationCost& cost = running.node.cost;
    Sums& sums = devices[slot.second];
    if (is_copy(slot.first)) {
      sums.copies_device += demand(cost.device_bytes, cost.duration);
      sums.copies_link += demand(cost.link_bytes, cost.duration);
      host.copies_host += demand(cost.host_bytes, cost.duration);
    } else {
      sums.device += demand(cost.device_bytes, cost.duration);
      host.host += demand(cost.host_bytes, cost.duration);
    }
  }
  const std::int64_t host_copies = share(limits_.host_rate, host.copies_host);
  const std::int64_t host_rest =
      share(limits_.host_rate - scaled(host.copies_host, host_copies), host.host);
  for (auto& [slot, running] : running_) {
    const OperationCost& cost = running.node.cost;
    const Sums& sums = devices[slot.second];
    const std::int64_t copies = std::min(share(limits_.device_rate, sums.copies_device),
                                         share(limits_.link_rate, sums.copies_link));
    std::int64_t rate = kFullRate;
    if (is_copy(slot.first)) {
      rate = std::min(copies, cost.host_bytes != 0 ? host_copies : kFullRate);
    } else {
      if (cost.device_bytes != 0) {
        rate = share(limits_.device_rate - scaled(sums.copies_device, copies), sums.device);
      }
      if (cost.host_bytes != 0) rate = std::min(rate, host_rest);
    }
    running.rate = rate;
  }
}

Nanoseconds Timeline::next_moment() const {
  Nanoseconds next = kForever;
  for (const auto& [slot, running] : running_) {
    next = std::min(next, now_ + (running.remaining + running.rate - 1) / running.rate);
  }
  for (const auto& [id, lane] : busy_) {
    if (lane->is_running) continue;
    const Nanoseconds ready = ready_time(*lane);
    if (ready > now_) next = std::min(next, ready);
  }
  return next;
}

void Timeline::progress(Nanoseconds until) {
  for (auto& [slot, running] : running_) {
    // Its end is the next moment at the latest, so this cannot overflow.
    running.remaining -= std::min(running.remaining, running.rate * (until - now_));
  }
  now_ = until;
}

void Timeline::finish_done() {
  for (auto position = running_.begin(); position != running_.end();) {
    Running& running = position->second;
    if (running.remaining > 0) {
      ++position;
      continue;
    }
    Lane* const lane = running.lane;
    running.span.end = now_;
    const Origin ended{running.span.number, running.span.resource};
    freed_by_[position->first] = ended;
    last_ended_ = ended;
    lane->end = now_;
    lane->end_origin = ended;
    lane->by_event = false;
    lane->is_running = false;
    lane->after_kernel = running.span.resource == Resource::kCompute;
    if (running.node.mark != nullptr) *running.node.mark = now_;
    on_span_(running.span);
    position = running_.erase(position);
    pop(lane);
  }
}

Timeline::Step Timeline::step(Nanoseconds limit) {
  bool needs_execution = false;
  bool changed = false;
  for (;;) {
    // Waits first, also for what starts and ends at this very moment.
    while (finish_marks()) changed = true;
    Lane* const lane = next_to_start(&needs_execution);
    if (lane == nullptr) break;
    start(lane);
    changed = true;
  }
  if (changed) set_rates();
  if (needs_execution) return Step::kNeedsExecution;
  const Nanoseconds next = next_moment();
  if (next > limit || (next == kForever && limit != kForever)) {
    if (limit > now_) progress(limit);
    return Step::kReachedLimit;
  }
  if (next == kForever) return changed ? Step::kAdvanced : Step::kIdle;
  progress(next);
  finish_done();
  set_rates();
  while (finish_marks()) {
  }
  return Step::kAdvanced;
}

TimelineNode* Timeline::unexecuted_node(LaneId id, Ticket ticket) {
  const auto lane = lanes_.find(id);
  if (lane == lanes_.end()) return nullptr;
  for (TimelineNode& node : lane->second.pending) {
    if (node.ticket == ticket && node.needs_execution) return &node;
  }
  return nullptr;
}

void Timeline::executed(LaneId lane, Ticket ticket, Nanoseconds extra) {
  TimelineNode* const node = unexecuted_node(lane, ticket);
  if (node == nullptr) return;
  node->needs_execution = false;
  node->cost.duration = std::clamp(node->cost.duration + extra, Nanoseconds{0}, kDurationMax);
}

void Timeline::await(LaneId lane, Ticket ticket, LaneId awaited_lane, Ticket awaited_ticket) {
  TimelineNode* const node = unexecuted_node(lane, ticket);
  if (node == nullptr || is_done(awaited_lane, awaited_ticket)) return;
  node->awaited_lane = awaited_lane;
  node->awaited_ticket = awaited_ticket;
}

const Timeline::Lane* Timeline::find(LaneId id) const {
  const auto found = lanes_.find(id);
  return found == lanes_.end() ? nullptr : &found->second;
}

bool Timeline::is_done(LaneId id, Ticket ticket) const {
  const Lane* const lane = find(id);
  return lane == nullptr || lane->pending.empty() || lane->pending.front().ticket > ticket;
}

bool Timeline::needs_execution(LaneId id, Ticket ticket) const {
  const Lane* const lane = find(id);
  if (lane == nullptr) return false;
  return std::any_of(lane->pending.begin(), lane->pending.end(), [&](const TimelineNode& node) {
    return node.ticket == ticket && node.needs_execution;
  });
}

Ticket Timeline::launch_behind(LaneId id, std::size_t depth) const {
  const Lane* const lane = find(id);
  if (lane == nullptr || lane->launches <= depth) return 0;
  std::size_t surplus = lane->launches - depth;
  for (const TimelineNode& node : lane->pending) {
    if (!node.cost.shares_launch && --surplus == 0) return node.ticket;
  }
  return 0;
}

const char* Timeline::next_name(LaneId id) const {
  const Lane* const lane = find(id);
  return lane == nullptr || lane->pending.empty() ? "" : lane->pending.front().name;
}

std::vector<std::pair<LaneId, Ticket>> Timeline::busy_lanes(int device) const {
  std::vector<std::pair<LaneId, Ticket>> found;
  for (const auto& [id, lane] : busy_) {
    if (lane->stream == nullptr || (device >= 0 && lane->device != device)) continue;
    found.emplace_back(id, lane->pending.back().ticket);
  }
  return found;
}

Origin Timeline::origin(LaneId id) const {
  const Lane* const lane = find(id);
  return lane == nullptr ? Origin{} : lane->end_origin;
}

}  // namespace spillover::emulator
