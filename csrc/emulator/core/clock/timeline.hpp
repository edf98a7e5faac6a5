// The virtual device's time: which operation runs from when to when. A discrete-event simulation in
// integer nanoseconds that knows nothing of bytes, streams' handles or threads.
//
// A lane is a stream, or a queue of work for host-side resources. Its nodes run in order; a node
// starts when it has been submitted, when its lane is free, when what it waits for is done and when
// its resource is free. Every resource runs one node at a time, and is never idle while a node
// could start on it. Among those that could, the one with the greatest priority goes first, then
// the one that has been ready longest, then the lower lane, then the earlier ticket.
//
// Note [Shared bandwidth]: nodes that run at the same time share three bandwidths: the device's
// memory, the link of its copy engines in both directions together, and the host's memory. Copy
// engines come first: where they ask for more than there is, all of them slow down by the same
// factor; other nodes share what copies leave, by the same rule. Progress is counted in
// 2^20ths of a nanosecond at full speed and rates are integers, so that a node's end does not
// depend on how often anybody looked.
//
// Note [Sparse tickets]: a ticket of a stream that needs no time has no node. A ticket is done when
// no node with that or a lower ticket is left.
//
// Owned by the Clock; guarded by Machine::mutex.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <vector>

#include "emulator/core/clock/profile.hpp"
#include "emulator/core/operation.hpp"
#include "emulator/core/types.hpp"

namespace spillover::emulator {

using LaneId = std::uint64_t;

// Lanes from here on are work of the host; below are streams, by their ids.
inline constexpr LaneId kHostLanes = LaneId{1} << 62;

inline constexpr Nanoseconds kForever = std::numeric_limits<Nanoseconds>::max();

// What fixed a moment: a span that ended then, or a thread of the host.
struct Origin {
  static constexpr std::uint64_t kNoSpan = ~std::uint64_t{0};
  std::uint64_t span = kNoSpan;
  Resource resource = Resource::kNone;  // of the span
};

// Where a thread of the host was when it submitted a node.
struct HostStamp {
  std::uint32_t thread = 0;
  Nanoseconds resumed = 0;  // when its latest wait ended
  Origin waited_for;        // what that wait was for
};

// A stretch of work on a resource that has come to its end.
struct Span {
  std::uint64_t number = 0;
  const char* name = "";
  LaneId lane = 0;
  Resource resource = Resource::kNone;
  int device = 0;
  Nanoseconds submitted = 0;
  Nanoseconds ready = 0;  // when its lane and what it waited for were done
  Nanoseconds start = 0;
  Nanoseconds end = 0;
  std::uint64_t bytes = 0;
  std::uint64_t submission = 0;  // in the order in which nodes were appended, from 1 on
  KernelLimit limit = KernelLimit::kFixed;
  Origin cause;           // what it started after; no span: the launch by the host
  bool by_event = false;  // the cause is of another lane
  HostStamp host;
};

struct TimelineNode {
  Ticket ticket = 0;
  const char* name = "";
  OperationCost cost;
  Nanoseconds submitted = 0;
  std::uint64_t submission = 0;
  HostStamp host;
  // Waits for a ticket of another lane.
  LaneId awaited_lane = 0;
  Ticket awaited_ticket = 0;  // 0: for none
  // Its duration is known, or its end allowed, only once it has really run.
  bool needs_execution = false;
  std::shared_ptr<Nanoseconds> mark;  // set to the moment when the node's turn comes
};

struct TimelineLimits {
  std::int64_t device_rate = 0;  // bytes a microsecond
  std::int64_t link_rate = 0;
  std::int64_t host_rate = 0;
  Nanoseconds kernel_gap = 0;  // between two kernels of a lane
};

class Timeline {
 public:
  enum class Step { kAdvanced, kReachedLimit, kIdle, kNeedsExecution };

  Timeline(const TimelineLimits& limits, std::function<void(const Span&)> on_span);

  // The lane of a stream; made at first use. stream may be null for host-side work.
  void append(LaneId lane, int device, int priority, const StreamRef& stream, TimelineNode node);

  // One step towards limit: starts what can start, then goes to the next moment at which anything
  // happens. Where that is behind limit, goes to limit only.
  Step step(Nanoseconds limit);

  // After kNeedsExecution: the node that must really run first.
  struct Need {
    LaneId lane = 0;
    Ticket ticket = 0;
    StreamRef stream;  // null: work of a thread of the host
  };
  const Need& need() const { return need_; }

  // A node with needs_execution has run, and takes this long.
  void executed(LaneId lane, Ticket ticket, Nanoseconds extra);
  // The same, and waits for a ticket of another lane first.
  void await(LaneId lane, Ticket ticket, LaneId awaited_lane, Ticket awaited_ticket);

  bool is_done(LaneId lane, Ticket ticket) const;
  bool is_idle(LaneId lane) const { return is_done(lane, ~Ticket{0}); }

  // Ticket of the node that must be done before at most depth launches are left; 0: none. A graph
  // is one launch.
  Ticket launch_behind(LaneId lane, std::size_t depth) const;

  // Lanes with work, those of a device or (-1) all, with the last ticket of each.
  std::vector<std::pair<LaneId, Ticket>> busy_lanes(int device) const;

  // Whether a node still has to run really before its end can be told.
  bool needs_execution(LaneId lane, Ticket ticket) const;

  // What a lane does next; "" where it is idle.
  const char* next_name(LaneId lane) const;

  // What ended a lane's latest node, and what ended last of all.
  Origin origin(LaneId lane) const;
  Origin last_ended() const { return last_ended_; }

  Nanoseconds now() const { return now_; }

  // How many nodes have been appended.
  std::uint64_t submissions() const { return submissions_; }

  // When anything happens next, if nothing else is submitted; kForever: nothing will.
  Nanoseconds next_moment() const;

 private:
  struct Lane {
    LaneId id = 0;
    int device = 0;
    int priority = 0;
    StreamRef stream;  // kept while there is work
    std::deque<TimelineNode> pending;
    std::size_t launches = 0;  // of what is pending
    Nanoseconds end = 0;
    Origin end_origin;
    bool by_event = false;  // end_origin came by a wait
    bool is_running = false;
    bool after_kernel = false;
  };

  struct Running {
    Lane* lane = nullptr;
    TimelineNode node;
    Span span;
    std::int64_t remaining = 0;  // of a nanosecond's 2^20ths
    std::int64_t rate = 0;
  };

  // A resource and the device whose it is; the host has one of each of its own.
  using Slot = std::pair<Resource, int>;
  static Slot slot_of(const OperationCost& cost, int device);

  Nanoseconds ready_time(const Lane& lane) const;
  bool may_go_on(const Lane& lane) const;  // its front node's time and dependencies have come
  bool finish_marks();
  Lane* next_to_start(bool* needs_execution);
  void start(Lane* lane);
  void pop(Lane* lane);
  TimelineNode* unexecuted_node(LaneId lane, Ticket ticket);
  void progress(Nanoseconds until);
  void finish_done();
  void set_rates();
  const Lane* find(LaneId lane) const;

  const TimelineLimits limits_;
  const std::function<void(const Span&)> on_span_;
  Nanoseconds now_ = 0;
  std::map<LaneId, Lane> lanes_;
  std::map<LaneId, Lane*> busy_;  // lanes with pending nodes
  std::map<Slot, Running> running_;
  std::map<Slot, Origin> freed_by_;  // what each resource ran last
  std::uint64_t next_span_ = 0;
  std::uint64_t submissions_ = 0;
  Origin last_ended_;
  Need need_;
};

}  // namespace spillover::emulator
