// The virtual clock: what every operation and wait of the emulated machine would have taken on the
// card of a profile.
//
// It is bookkeeping beside execution. Work that is put on a stream is also put on the stream's lane
// of the timeline, which is simulated only as far as somebody asks: a query up to the asking
// thread's own time, a wait up to the end of what is waited for. What is virtually done is then
// really done before the call returns. Nothing can be submitted before a time that a thread has
// reached, so what was simulated stays true.
//
// Off by default; enabled() is then the only thing that anybody looks at.
//
// Owned by the Machine; called with its mutex held. Functions with a Lock& parameter may let go of
// it.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "emulator/core/clock/host_turns.hpp"
#include "emulator/core/clock/profile.hpp"
#include "emulator/core/clock/recorder.hpp"
#include "emulator/core/clock/timeline.hpp"
#include "emulator/core/stream.hpp"

namespace spillover::emulator {

class Machine;
struct Config;

class Clock {
 public:
  Clock(Machine* machine, const Config& config);

  bool enabled() const { return enabled_; }
  const ClockProfile& profile() const { return profile_; }

  // What operations cost.
  enum class Route { kDeviceToDevice, kToDevice, kToHost, kPeer, kHostToHost };
  OperationCost copy_cost(Route route, bool is_pageable, std::uint64_t bytes) const;
  OperationCost bytes_bound_cost(std::uint64_t bytes) const;  // a kernel that only moves bytes

  // An operation was queued on the stream; its ticket is stream->enqueued.
  void append(const StreamRef& stream, const Operation& operation);

  // A kernel that the calling thread performs itself.
  void append_kernel(const StreamRef& stream, const char* name, const OperationCost& cost);

  // Lets the host wait while the stream's launch queue is full.
  void throttle(Lock& lock, const StreamRef& stream);

  // An operation whose end cannot be computed has run: a host function, a wait for a value.
  void executed(const Stream& stream, Ticket ticket);

  // The host waits for a ticket, for everything on a device (-1: on all).
  void wait(Lock& lock, const StreamRef& stream, Ticket ticket);
  void wait_device(Lock& lock, int device);

  // Whether a ticket is done at the calling thread's time. Polling takes time, so that it ends.
  bool has_passed(Lock& lock, const StreamRef& stream, Ticket ticket);

  // The same, without asking anew.
  bool is_done(const Stream& stream, Ticket ticket) const {
    return timeline_.is_done(stream.id, ticket);
  }

  // The host's own time.
  Nanoseconds now() { return turns_.current().now; }
  void advance(Nanoseconds duration);
  void charge_call(const char* function);
  void charge_event();  // a record that takes the time
  void charge_pinning(std::uint64_t bytes);

  // Work of the host on a resource; false for a resource that there is not. A negative duration
  // asks the profile. The calling thread does it itself, or has submitted it to a thread that
  // reports when it begins and ends. A CPU operator is such work too, but within what a thread
  // reports of it.
  bool work(Lock& lock, const char* resource, std::uint64_t bytes, Nanoseconds duration);
  void host_operator(Lock& lock, const char* name, std::uint64_t bytes, bool is_optimizer);
  std::uint64_t submit_work(const char* resource, std::uint64_t bytes);
  void begin_work(std::uint64_t id);
  void end_work(std::uint64_t id);
  void wait_for_work(Lock& lock, std::uint64_t id);
  bool work_has_passed(Lock& lock, std::uint64_t id);

  // Notes how much memory is in use, where that has changed.
  void note_memory();
  void note_block(std::int64_t bytes);

  // A switching point: lets threads that are behind go first.
  void yield(Lock& lock);

  // A moment: when all that was launched so far is done. Its time is what is known of it yet.
  std::int64_t mark();
  Nanoseconds mark_time(std::int64_t mark) const { return recorder_.mark_time(mark); }

  std::string report(Lock& lock);
  std::string limits(Nanoseconds from, Nanoseconds to) const { return recorder_.limits(from, to); }
  bool write_trace(Lock& lock, const char* path);

 private:
  enum class Patience { kBlock, kBrief };

  void push(const StreamRef& stream, TimelineNode node);
  void perform(Lock& lock, const char* name, const OperationCost& cost);
  void push_detached(LaneId lane, const StreamRef& stream, TimelineNode node);
  bool run_until(Lock& lock, LaneId lane, Ticket ticket);
  bool run_to_now(Lock& lock, LaneId lane, Ticket ticket);
  void charge_polling(HostThread* thread);
  bool execute(Lock& lock, const Timeline::Need& need, Patience patience);
  void end_wait(HostThread* thread, Nanoseconds start, const char* cause, Origin origin);
  OperationCost work_cost(Resource resource, std::uint64_t bytes, Nanoseconds duration) const;
  Recorder::Facts facts(Lock& lock);

  Machine* machine_;
  const bool enabled_;
  const ClockProfile profile_;
  const std::string profile_name_;
  HostTurns& turns_;
  Recorder recorder_;
  Timeline timeline_;
  std::map<std::string, Nanoseconds, std::less<>> call_costs_;
  const std::size_t queue_depth_;
  const Nanoseconds launch_latency_;
  std::uint64_t next_work_ = 1;
  std::condition_variable work_ended_;
  std::vector<std::uint64_t> memory_bytes_;  // by device, as last noted
  std::int64_t block_bytes_ = 0;
};

}  // namespace spillover::emulator
