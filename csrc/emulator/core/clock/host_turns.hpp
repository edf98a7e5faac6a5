// The threads of the program under the virtual clock: each one's time, and whose turn it is.
//
// Note [Turns]: threads that Python started ("followed" ones) run one at a time. A thread keeps its
// turn until it blocks, ends, or comes to a switching point while a thread with an earlier (time,
// id) could go on. Ids are given in the order in which the program starts its threads. So which
// thread does what next follows from virtual time alone, whatever the operating system does.
// A switching point is one where no thread holds a lock that another may need: Python's own
// synchronisation, an operator's end, a call that waits for the device. Whoever waits for its turn
// lets go of Python's interpreter lock.
//
// Threads of C++ are not followed and never switch. Autograd's workers act for the thread whose
// turn it is, which waits for them, and move its clock; where a hook waits for another thread, the
// turn passes on as if that thread waited. All others (of process groups, of pools)
// are detached: see Note [Detached threads] in detached.hpp. What a followed thread waits for in
// ways that nobody sees (an import, a lock of C++, a pipe) is noticed when nothing has moved for
// half a second: the turn passes on, and the report counts it as an unseen wait, since the order
// may then differ.
//
// Turns are taken from the device's start on: what a program does before (imports, compilers) has
// no virtual time. Threads that run already join in at their next switching point.
//
// One object a process, leaked on purpose. Any thread may call. Its mutex is a leaf: it may be
// locked with Machine::mutex held, never the other way around.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "emulator/core/clock/recorder.hpp"
#include "emulator/core/clock/timeline.hpp"

namespace spillover::emulator {

struct HostThread {
  std::uint32_t id = 0;
  std::string name;
  std::atomic<Nanoseconds> now{0};
  // Only the thread whose turn it is touches these.
  Nanoseconds resumed = 0;
  Origin waited_for;
  // Queries that found work undone since the thread last submitted any or waited, and when the
  // first was.
  unsigned queries = 0;
  Nanoseconds polls_since = 0;

  void move_to(Nanoseconds time) {
    if (time > now) now = time;
  }
  HostStamp stamp() const { return {id, resumed, waited_for}; }
};

class HostTurns {
 public:
  static HostTurns& instance();

  // The thread that the calling one is, or acts for.
  HostThread& current();

  // Makes the calling thread the first one that is followed.
  void begin(const char* name);

  // The device starts.
  void start();

  // A thread is about to be started: its id. It calls attach when it runs, and end.
  std::uint32_t announce(const char* name);
  void attach(std::uint32_t id);
  void end();
  void cancel(std::uint32_t id);  // it could not be started

  // A switching point. order_time stands for the thread's own time while others go first.
  void yield();
  void yield(Nanoseconds order_time);

  enum class Outcome : int {
    kNotFollowed = 0,  // wait by other means
    kWoken = 1,
    kTimedOut = 2,
    kPending = 3  // call again: gives the interpreter a chance to look at signals
  };

  // Gives the turn up until somebody wakes the token, or, where timeout is not negative, until that
  // much virtual time has passed.
  Outcome block(std::uint64_t token, Nanoseconds timeout);

  // The thread found what it waited for without being woken.
  void resume();
  void wake(std::uint64_t token);

  // The earliest time at which another followed thread may do something; for one that is not
  // followed, and where there is no other, kForever.
  Nanoseconds limit();
  bool is_followed() const;

  // Whether the calling thread has no time: one of C++ beside threads that are followed.
  bool is_detached() const;

  std::vector<Recorder::ThreadEntry> entries();
  std::uint64_t unseen_waits();

  // How Python's interpreter lock is let go of and taken back; release returns 0 where the calling
  // thread does not hold it.
  void set_interpreter(int (*release)(void** state), void (*restore)(void* state));

 private:
  enum class State { kRunnable, kBlocked, kOutside };
  struct Entry : HostThread {
    State state = State::kRunnable;
    Nanoseconds order_time = 0;
    std::uint64_t token = 0;
    bool is_timed = false;
    bool timed_out = false;
    Nanoseconds deadline = 0;
    std::int64_t real_deadline_ns = 0;
    std::condition_variable turn;
  };
  using Guard = std::unique_lock<std::mutex>;

  class Pause;

  Entry* mine() const;
  Entry* waiting_entry() const;
  Entry* next(const Entry* except = nullptr) const;
  void pass();
  void take(Guard& guard, Entry* entry);
  bool wait_a_while(Guard& guard, Entry* entry);
  bool is_stuck();
  void make_runnable(Entry* entry, Nanoseconds order_time);

  std::mutex mutex_;
  std::map<std::uint32_t, std::unique_ptr<Entry>> threads_;  // in the order of their ids
  std::vector<Recorder::ThreadEntry> ended_;
  std::atomic<bool> is_started_{false};
  std::atomic<bool> follows_any_{false};
  Entry* holder_ = nullptr;
  Entry* last_holder_ = nullptr;  // never dangling: the first thread where the last has ended
  std::uint32_t next_id_ = 0;
  std::uint64_t unseen_waits_ = 0;
  std::atomic<std::uint64_t> progress_{0};
  std::atomic<HostThread*> acting_{nullptr};
  // What is_stuck saw last.
  std::uint64_t seen_progress_ = 0;
  std::int64_t seen_cpu_ns_ = 0;
  std::int64_t seen_at_ns_ = 0;
  int (*release_interpreter_)(void**) = nullptr;
  void (*restore_interpreter_)(void*) = nullptr;
};

}  // namespace spillover::emulator
