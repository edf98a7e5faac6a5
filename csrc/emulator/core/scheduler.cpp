#include "emulator/core/scheduler.hpp"

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

#include "emulator/core/execute.hpp"
#include "emulator/core/machine.hpp"
#include "emulator/core/report.hpp"

namespace spillover::emulator {
namespace {

// A GPU accepts about this many launches on a stream before it makes the host wait.
constexpr std::size_t kPendingMax = 1024;

// How long a host function may be put off on the schedules that put work off.
constexpr auto kHostFunctionDelay = std::chrono::milliseconds(5);

// How often a wait for a value in memory looks again: the host may write it without telling us.
constexpr auto kValuePollInterval = std::chrono::microseconds(200);

constexpr int kRandomStepsMax = 3;

void write_reports(Lock* lock, ReportScope* reports) {
  if (reports->empty()) return;
  lock->unlock();
  reports->write();
  lock->lock();
}

}  // namespace

Scheduler::Scheduler(Machine* machine, const Config& config)
    : machine_(machine), schedule_(config.schedule), random_(config.seed) {}

void Scheduler::activate(const StreamRef& stream) {
  if (stream->active_index != Stream::kNotActive) return;
  stream->active_index = active_.size();
  active_.push_back(stream);
}

void Scheduler::deactivate(Stream* stream) {
  const std::size_t index = stream->active_index;
  stream->active_index = Stream::kNotActive;
  if (index + 1 != active_.size()) {
    active_[index] = std::move(active_.back());
    active_[index]->active_index = index;
  }
  active_.pop_back();
}

void Scheduler::append(const StreamRef& stream, Operation operation) {
  const bool is_awaited_elsewhere = operation.is_awaited_elsewhere();
  stream->pending.push_back(std::move(operation));
  ++stream->enqueued;
  ++stream->version;
  activate(stream);
  if (machine_->clock.enabled()) machine_->clock.append(stream, stream->pending.back());
  if (is_awaited_elsewhere) {
    const bool at_once = schedule_ == Schedule::kEager || schedule_ == Schedule::kThreaded;
    stream->host_function_ticket = stream->enqueued;
    stream->host_function_due = std::chrono::steady_clock::now();
    if (!at_once) stream->host_function_due += kHostFunctionDelay;
    start_host_function_thread();
    host_function_queued_.notify_one();
  }
  if (schedule_ == Schedule::kThreaded) {
    start_worker();
    work_queued_.notify_one();
  }
}

void Scheduler::enqueue(Lock& lock, const StreamRef& stream, Operation operation) {
  append(stream, std::move(operation));
  if (schedule_ == Schedule::kEager) run_all_ready(lock);
  if (machine_->clock.enabled()) machine_->clock.throttle(lock, stream);
  if (stream->pending.size() <= kPendingMax) return;
  // A full queue makes the host wait, also behind a host function.
  run_until(lock, stream, stream->completed + 1, Patience::kBlock);
}

void Scheduler::settle(Lock& lock, const StreamRef& stream, std::size_t count) {
  if (schedule_ == Schedule::kEager) run_all_ready(lock);
  while (stream->pending.size() > kPendingMax + count) {
    run_until(lock, stream, stream->completed + 1, Patience::kBlock);
  }
}

bool Scheduler::is_satisfied(const WaitValue& wait) const {
  return value_matches(*machine_, wait);
}

bool Scheduler::is_ready(const Stream& stream) const {
  if (stream.running || stream.pending.empty()) return false;
  const Operation& front = stream.pending.front();
  if (front.is_host_function() || must_wait_for_bodies(front) || is_held(front)) return false;
  if (const auto* wait = std::get_if<WaitForTicket>(&front.body)) {
    return wait->stream->completed >= wait->ticket;
  }
  if (const auto* wait = std::get_if<WaitValue>(&front.body)) return is_satisfied(*wait);
  return true;
}

bool Scheduler::run_until(Lock& lock, const StreamRef& target, Ticket ticket, Patience patience) {
  // A stack of goals in place of recursion: chains of waits can be as long as the queues.
  struct Goal {
    StreamRef stream;
    Ticket ticket;
  };
  std::vector<Goal> goals{{target, ticket}};
  TimePoint give_up = TimePoint::max();  // set when the wait comes to a hold
  while (!goals.empty()) {
    Stream* const stream = goals.back().stream.get();
    if (stream->completed >= goals.back().ticket) {
      goals.pop_back();
      continue;
    }
    if (stream->running) {
      if (patience == Patience::kNone) return false;
      changed_.wait(lock);
      continue;
    }
    const Operation& front = stream->pending.front();
    const auto* wait = std::get_if<WaitForTicket>(&front.body);
    if (wait != nullptr && wait->stream->completed < wait->ticket) {
      goals.push_back({wait->stream, wait->ticket});
      continue;
    }
    if (patience == Patience::kNone && front.is_host_function()) return false;
    if (must_wait_for_bodies(front)) {
      if (patience == Patience::kNone) return false;
      changed_.wait(lock);
      continue;
    }
    if (is_held(front)) {
      if (patience == Patience::kNone) return false;
      wait_for_release(lock, std::get<Hold>(front.body).id, &give_up);
      continue;
    }
    const auto* value = std::get_if<WaitValue>(&front.body);
    if (value != nullptr && !is_satisfied(*value)) {
      if (patience == Patience::kNone) return false;
      if (!run_any(lock)) changed_.wait_for(lock, kValuePollInterval);
      continue;
    }
    run_front(lock, stream);
  }
  return true;
}

bool Scheduler::drain_briefly(Lock& lock, const StreamRef& stream, Ticket ticket,
                              std::chrono::milliseconds patience) {
  const TimePoint give_up = std::chrono::steady_clock::now() + patience;
  while (stream->completed < ticket && !run_until(lock, stream, ticket, Patience::kNone)) {
    stream->host_function_due = std::chrono::steady_clock::now();
    host_function_queued_.notify_one();
    if (changed_.wait_until(lock, give_up) == std::cv_status::timeout) break;
  }
  return stream->completed >= ticket;
}

std::uint64_t Scheduler::add_hold(std::chrono::milliseconds patience) {
  holds_.emplace(next_hold_, patience);
  return next_hold_++;
}

bool Scheduler::release_hold(Lock& lock, std::uint64_t id) {
  if (holds_.erase(id) == 0) return false;
  changed_.notify_all();
  work_queued_.notify_one();
  host_function_queued_.notify_one();
  if (schedule_ != Schedule::kEager) return true;
  // What came behind it could not run when it was enqueued.
  for (const StreamRef& stream : std::vector<StreamRef>(active_)) {
    advance(lock, stream, stream->enqueued);
  }
  return true;
}

// One wait for a hold, which others may end as well. Throws WaitTimedOut.
void Scheduler::wait_for_release(Lock& lock, std::uint64_t id, TimePoint* give_up) {
  if (*give_up == TimePoint::max()) *give_up = std::chrono::steady_clock::now() + holds_.at(id);
  if (changed_.wait_until(lock, *give_up) == std::cv_status::timeout && holds_.contains(id)) {
    throw WaitTimedOut{};
  }
}

void Scheduler::run_front(Lock& lock, Stream* stream) {
  const StreamRef alive = active_[stream->active_index];
  Operation operation = std::move(stream->pending.front());
  stream->pending.pop_front();
  stream->running = true;
  stream->running_host_function = operation.is_host_function();
  if (begin_operation(*machine_, *stream, operation)) {
    const bool is_body = !operation.is_host_function();
    bodies_running_ += is_body ? 1 : 0;
    lock.unlock();
    if (stream->delay_us > 0) {
      std::this_thread::sleep_for(std::chrono::microseconds(stream->delay_us));
    }
    perform_operation(*machine_, *stream, operation);
    lock.lock();
    bodies_running_ -= is_body ? 1 : 0;
  }
  stream->running = false;
  stream->running_host_function = false;
  if (machine_->clock.enabled()) machine_->clock.executed(*stream, stream->completed + 1);
  ++stream->completed;
  stream->query_count = 0;
  if (stream->pending.empty()) {
    deactivate(stream);
    if (stream->destroyed) machine_->streams.retire(*stream);
  }
  changed_.notify_all();
  if (schedule_ == Schedule::kThreaded) work_queued_.notify_one();
  if (operation.is_awaited_elsewhere()) host_function_queued_.notify_one();
}

void Scheduler::drain_device(Lock& lock, int device) {
  std::vector<std::pair<StreamRef, Ticket>> goals;
  for (const StreamRef& stream : active_) {
    if (device < 0 || stream->device == device) goals.emplace_back(stream, stream->enqueued);
  }
  for (const auto& [stream, ticket] : goals) drain(lock, stream, ticket);
}

bool Scheduler::run_any(Lock& lock) {
  for (std::size_t i = 0; i < active_.size(); ++i) {
    const std::size_t index = (next_start_ + i) % active_.size();
    if (!is_ready(*active_[index])) continue;
    next_start_ = index + 1;
    run_front(lock, active_[index].get());
    return true;
  }
  return false;
}

void Scheduler::run_all_ready(Lock& lock) {
  while (!active_.empty() && run_any(lock)) {
  }
}

void Scheduler::run_random(Lock& lock) {
  const auto steps = random_() % (kRandomStepsMax + 1);
  for (std::uint64_t step = 0; step < steps; ++step) {
    std::vector<Stream*> ready;
    for (const StreamRef& stream : active_) {
      if (is_ready(*stream)) ready.push_back(stream.get());
    }
    if (ready.empty()) return;
    // Not by place in active_, which depends on what finished when.
    std::sort(ready.begin(), ready.end(),
              [](const Stream* a, const Stream* b) { return a->id < b->id; });
    run_front(lock, ready[random_() % ready.size()]);
  }
}

// The threads are never joined: they use nothing that is destroyed, and the process's end ends
// them.
void Scheduler::start_host_function_thread() {
  if (std::exchange(host_function_thread_started_, true)) return;
  std::thread([this] { serve_host_functions(); }).detach();
}

void Scheduler::serve_host_functions() {
  ReportScope reports;
  Lock lock(machine_->mutex);
  for (;;) {
    write_reports(&lock, &reports);
    const TimePoint now = std::chrono::steady_clock::now();
    TimePoint next = TimePoint::max();
    StreamRef due;
    for (const StreamRef& stream : active_) {
      if (stream->host_function_ticket <= stream->completed) continue;
      if (stream->running_host_function) continue;  // its end notifies us
      if (stream->host_function_due <= now) {
        due = stream;
        break;
      }
      next = std::min(next, stream->host_function_due);
    }
    if (due != nullptr) {
      try {
        drain(lock, due, due->host_function_ticket);
        // What came behind it, on this stream or on one that waits for it, could not run when it
        // was enqueued.
        if (schedule_ == Schedule::kEager) run_all_ready(lock);
      } catch (const WaitTimedOut&) {
        due->host_function_due = std::chrono::steady_clock::now() + kHostFunctionDelay;
      }
    } else if (next == TimePoint::max()) {
      host_function_queued_.wait(lock);
    } else {
      host_function_queued_.wait_until(lock, next);
    }
  }
}

void Scheduler::start_worker() {
  if (std::exchange(worker_started_, true)) return;
  std::thread([this] { work(); }).detach();
}

void Scheduler::work() {
  ReportScope reports;
  Lock lock(machine_->mutex);
  for (;;) {
    write_reports(&lock, &reports);
    if (run_any(lock)) continue;
    const bool polling = std::any_of(active_.begin(), active_.end(), [](const StreamRef& stream) {
      return !stream->pending.empty() &&
             std::holds_alternative<WaitValue>(stream->pending.front().body);
    });
    if (polling) {
      work_queued_.wait_for(lock, kValuePollInterval);
    } else {
      work_queued_.wait(lock);
    }
  }
}

}  // namespace spillover::emulator
