// What a thread without a time of its own has waited for.
//
// Note [Detached threads]: a thread of C++ that no thread of the program waits for in a way that
// the clock sees (a process group's, a pool's) runs whenever the operating system lets it. Its
// calls take no time, and no thread's clock moves by them. When its work happens follows from what
// it waited for: what it puts on a stream starts after that in virtual time, whenever the thread
// really came to it. A wait after a launch begins anew, since pools give their threads one job
// after the other.
//
// One object a thread, used by that thread alone.
#pragma once

#include <algorithm>
#include <map>
#include <utility>

#include "emulator/core/clock/timeline.hpp"

namespace spillover::emulator {

class DetachedThread {
 public:
  static DetachedThread& current() {
    thread_local DetachedThread thread;
    return thread;
  }

  void wait(LaneId lane, Ticket ticket) {
    if (std::exchange(has_launched_, false)) awaited_.clear();
    Ticket& latest = awaited_[lane];
    latest = std::max(latest, ticket);
  }

  // What a launch comes after.
  const std::map<LaneId, Ticket>& launch() {
    has_launched_ = true;
    return awaited_;
  }

 private:
  std::map<LaneId, Ticket> awaited_;
  bool has_launched_ = false;
};

}  // namespace spillover::emulator
