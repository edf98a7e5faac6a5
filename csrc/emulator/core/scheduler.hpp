// Decides when queued operations run, and runs them. The one place where operations start and
// finish.
//
// Every thread that waits runs what it waits for itself, as far as nobody else does already; hence
// no schedule needs a thread of its own to make progress, but for two things: the threaded
// schedule's worker, and host functions, which a program may wait for by its own means (a flag, a
// queue) without calling CUDA, so a background thread runs streams that hold one; the same goes for
// records of events that another process waits for.
//
// Owned by the Machine; called with its mutex held. run_until, advance, drain and perturb let go of
// the mutex while an operation runs.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <map>
#include <random>
#include <vector>

#include "emulator/core/config.hpp"
#include "emulator/core/stream.hpp"
#include "emulator/core/types.hpp"

namespace spillover::emulator {

class Machine;

// Thrown where a thread has waited for a held stream as long as the hold allows. The call that
// waits has had no effect and returns CUDA_ERROR_TIMEOUT.
struct WaitTimedOut {};

class Scheduler {
 public:
  Scheduler(Machine* machine, const Config& config);

  // Appends the operation to the stream's queue; its ticket is stream->enqueued afterwards.
  void append(const StreamRef& stream, Operation operation);

  // The same, and runs it at once on the eager schedule.
  void enqueue(Lock& lock, const StreamRef& stream, Operation operation);

  // What enqueue does after it has appended, for `count` operations at once.
  void settle(Lock& lock, const StreamRef& stream, std::size_t count);

  // Blocks until the stream has completed the ticket. Throws WaitTimedOut.
  void drain(Lock& lock, const StreamRef& stream, Ticket ticket) {
    if (stream->completed < ticket) run_until(lock, stream, ticket, Patience::kBlock);
  }

  // The same for everything enqueued so far on a device; -1: on all.
  void drain_device(Lock& lock, int device);

  // Runs what can run now towards the ticket. Never waits, and leaves host functions alone.
  void advance(Lock& lock, const StreamRef& stream, Ticket ticket) {
    if (stream->completed < ticket) run_until(lock, stream, ticket, Patience::kNone);
  }

  // Blocks until the stream has completed the ticket, or for as long as patience where a host
  // function or a hold does not come to its end. False then.
  bool drain_briefly(Lock& lock, const StreamRef& stream, Ticket ticket,
                     std::chrono::milliseconds patience);

  // A new hold, for an operation of that id. Whoever waits for it gives up after patience.
  std::uint64_t add_hold(std::chrono::milliseconds patience);

  // False where there is no such hold (any more).
  bool release_hold(Lock& lock, std::uint64_t id);

  const std::vector<StreamRef>& active_streams() const { return active_; }

  // On the random schedule, runs a few operations chosen by the seed. Called once an API call.
  void perturb(Lock& lock) {
    if (schedule_ == Schedule::kRandom && !active_.empty()) run_random(lock);
  }

  // Waits until no copy, memset or kernel is running, so that memory may be unmapped. Host
  // functions do not count: they may block on anything.
  void wait_for_running_bodies(Lock& lock) {
    while (bodies_running_ > 0) changed_.wait(lock);
  }

 private:
  enum class Patience { kBlock, kNone };

  bool run_until(Lock& lock, const StreamRef& target, Ticket ticket, Patience patience);
  void wait_for_release(Lock& lock, std::uint64_t id, TimePoint* give_up);
  void run_front(Lock& lock, Stream* stream);
  void run_random(Lock& lock);

  // True when the first operation in the queue can run to its end without waiting for anyone.
  bool is_ready(const Stream& stream) const;
  bool is_satisfied(const WaitValue& wait) const;
  bool is_held(const Operation& operation) const {
    const auto* hold = std::get_if<Hold>(&operation.body);
    return hold != nullptr && holds_.contains(hold->id);
  }

  // Memory is not unmapped under a copy that is running, be it one that should have been waited
  // for.
  bool must_wait_for_bodies(const Operation& operation) const {
    return bodies_running_ > 0 && std::holds_alternative<FreeMemory>(operation.body);
  }

  // Runs one ready operation of any stream but host functions, from a rotating start.
  bool run_any(Lock& lock);

  // The same until none is ready.
  void run_all_ready(Lock& lock);

  void activate(const StreamRef& stream);
  void deactivate(Stream* stream);

  void start_host_function_thread();
  void serve_host_functions();
  void start_worker();
  void work();

  Machine* machine_;
  const Schedule schedule_;
  std::vector<StreamRef> active_;
  std::size_t next_start_ = 0;
  int bodies_running_ = 0;
  std::mt19937_64 random_;
  std::map<std::uint64_t, std::chrono::milliseconds> holds_;  // not yet released
  std::uint64_t next_hold_ = 1;
  std::condition_variable changed_;  // an operation finished
  std::condition_variable host_function_queued_;
  std::condition_variable work_queued_;
  bool host_function_thread_started_ = false;
  bool worker_started_ = false;
};

}  // namespace spillover::emulator
