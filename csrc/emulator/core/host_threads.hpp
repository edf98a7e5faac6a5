// What each thread of the program knows of the streams' progress.
//
// Note [Host threads]: a thread that Python started, and that spillover.emulator follows, has a
// clock of its own. It learns what it waits for, and what other threads release to it (a lock, a
// queue, a thread's start and end). Threads of C++ (autograd's workers, gloo, our disk engine) hand
// knowledge on in ways that nobody can see, so they know all that any thread knows, and whatever
// they know every thread knows. So does what anyone learnt by polling: caching allocators poll
// under locks of their own, and give what they find to whichever thread asks next. The host's own
// accesses are one actor: an order between two threads is the business of tools for threads.
//
// Owned by Streams; guarded by Machine::mutex.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>

#include "emulator/core/vector_clock.hpp"

namespace spillover::emulator {

class HostThreads {
 public:
  // A clock and a number that no other state of any clock has.
  struct Knowledge {
    VectorClock clock;
    std::uint64_t version = 0;
  };

  // What the calling thread knows.
  const Knowledge& current();

  // All that any thread knows: what holds for memory that allocators hand from thread to thread
  // under locks that nobody sees.
  const VectorClock& everyone() const { return everyone_.clock; }

  // A copy of it that is shared between calls, to be kept with what the thread gives back.
  std::shared_ptr<const VectorClock> snapshot();

  // The calling thread waited for work that had this clock.
  void learn(const VectorClock& clock);

  // Every thread may rely on it from here on.
  void learn_for_all(const VectorClock& clock);
  void publish() { learn_for_all(current().clock); }

  // From here on the calling thread has a clock of its own, that begins with what is known to all.
  // Needs no lock, and no device yet.
  static void begin();
  static void end();

  // Hands knowledge on through a token, the identity of a lock or a message.
  void release(std::uint64_t token);
  void acquire(std::uint64_t token);
  void forget(std::uint64_t token) { released_.erase(token); }

 private:
  struct Thread;
  Thread* this_thread();  // nullptr: not followed

  static bool merge(Knowledge* into, const VectorClock& clock, std::uint64_t* next_version);

  Knowledge shared_;    // known to all
  Knowledge everyone_;  // all that any thread knows
  std::uint64_t next_version_ = 1;
  std::shared_ptr<const VectorClock> snapshot_;
  std::uint64_t snapshot_version_ = 0;
  std::unordered_map<std::uint64_t, VectorClock> released_;
};

}  // namespace spillover::emulator
