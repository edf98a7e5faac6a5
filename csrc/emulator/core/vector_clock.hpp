// What an actor (a stream, or the host) knows of every actor's progress.
//
// Note [Happens-before]: operation t of actor A is ordered before an operation of actor B exactly
// when B's clock has at(A) >= t. Clocks are merged where CUDA orders things: at an event's wait or
// synchronisation, at a stream's or device's synchronisation, at a query that returned "done", and
// from the host to a stream at every launch. All of it happens in the order of API calls, so what
// is reported does not depend on the schedule that ran.
//
// Actors are small dense numbers. The number of a destroyed stream is given to a new one only once
// the host knows of all its work, so an old access can never pass for an access of the new
// stream's.
//
// A value; guarded by Machine::mutex.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "emulator/core/types.hpp"

namespace spillover::emulator {

using ActorId = std::uint32_t;

// All host threads are one actor: an ordering between two of them that goes through a lock or a
// queue cannot be seen, and must not be reported as missing.
inline constexpr ActorId kHostActor = 0;

class VectorClock {
 public:
  Ticket at(ActorId actor) const { return actor < ticks_.size() ? ticks_[actor] : 0; }

  void set(ActorId actor, Ticket tick) {
    if (actor >= ticks_.size()) ticks_.resize(actor + 1, 0);
    ticks_[actor] = tick;
  }

  // Takes the later of both for every actor; true if anything was news.
  bool merge(const VectorClock& other) {
    if (other.ticks_.size() > ticks_.size()) ticks_.resize(other.ticks_.size(), 0);
    bool changed = false;
    for (std::size_t i = 0; i < other.ticks_.size(); ++i) {
      if (other.ticks_[i] <= ticks_[i]) continue;
      ticks_[i] = other.ticks_[i];
      changed = true;
    }
    return changed;
  }

 private:
  std::vector<Ticket> ticks_;
};

}  // namespace spillover::emulator
