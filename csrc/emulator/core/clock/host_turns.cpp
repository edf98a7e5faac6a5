#include "emulator/core/clock/host_turns.hpp"

#include <pthread.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>
#include <system_error>

namespace spillover::emulator {
namespace {

constexpr auto kSlice = std::chrono::milliseconds(50);

// Nothing has moved for so long, and the process neither computes nor could: the thread whose turn
// it is waits for something that nobody sees.
constexpr std::int64_t kIdleNs = 500'000'000;
// However busy it is: it may be waiting in a loop.
constexpr std::int64_t kSilentNs = 10'000'000'000;

thread_local void* followed = nullptr;
// For whom an autograd worker waits.
thread_local void* stood_for = nullptr;

// By the name that torch gives them.
bool is_autograd_worker() {
  constexpr std::string_view kName = "pt_autograd";
  char name[16] = "";  // what Linux keeps
  return pthread_getname_np(pthread_self(), name, sizeof name) == 0 &&
         std::string_view(name).starts_with(kName);
}

HostTurns* the_turns = nullptr;

std::int64_t read_clock(clockid_t clock) {
  timespec time{};
  clock_gettime(clock, &time);
  return std::int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec;
}

// Whether another thread of the process runs, waits for a processor, or for a disk: on a machine
// with too much to do a process computes hardly anything for seconds and yet waits for nothing.
bool another_thread_is_ready() {
  std::error_code error;
  const std::string self = std::to_string(gettid());
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task", error)) {
    if (task.path().filename() == self) continue;
    std::ifstream file(task.path() / "stat");
    std::string text;
    std::getline(file, text);
    // The state comes after the name, which is in parentheses and may have any characters.
    const std::size_t name_end = text.rfind(')');
    if (name_end == std::string::npos || name_end + 2 >= text.size()) continue;
    const char state = text[name_end + 2];
    if (state == 'R' || state == 'D') return true;
  }
  return false;
}

// In a forked child there is one thread, and nobody to take turns with.
void forget_after_fork() {
  followed = stood_for = nullptr;
  the_turns = new HostTurns;
}

}  // namespace

// Lets go of the interpreter lock while a thread waits for its turn.
class HostTurns::Pause {
 public:
  explicit Pause(const HostTurns& turns) : restore_(turns.restore_interpreter_) {
    held_ = turns.release_interpreter_ != nullptr && turns.release_interpreter_(&state_) != 0;
  }
  ~Pause() {
    if (held_) restore_(state_);
  }
  Pause(const Pause&) = delete;
  Pause& operator=(const Pause&) = delete;

 private:
  void (*const restore_)(void*);
  void* state_ = nullptr;
  bool held_ = false;
};

HostTurns& HostTurns::instance() {
  static const bool made = [] {
    the_turns = new HostTurns;
    pthread_atfork(nullptr, nullptr, forget_after_fork);
    return true;
  }();
  static_cast<void>(made);
  return *the_turns;
}

HostTurns::Entry* HostTurns::mine() const {
  return static_cast<Entry*>(followed);
}

bool HostTurns::is_followed() const {
  return followed != nullptr;
}

bool HostTurns::is_detached() const {
  if (followed != nullptr || !follows_any_) return false;
  thread_local const bool is_worker = is_autograd_worker();
  return !is_worker;
}

HostThread& HostTurns::current() {
  progress_.fetch_add(1, std::memory_order_relaxed);
  if (Entry* const entry = mine()) return *entry;
  if (HostThread* const acting = acting_.load()) return *acting;
  const Guard guard(mutex_);
  if (threads_.empty()) {  // a program without Python: all of its threads are one
    auto entry = std::make_unique<Entry>();
    entry->name = "host";
    acting_ = last_holder_ = entry.get();
    next_id_ = 1;
    threads_.emplace(0, std::move(entry));
  }
  return *threads_.begin()->second;
}

void HostTurns::begin(const char* name) {
  current();
  const Guard guard(mutex_);
  Entry* const first = threads_.begin()->second.get();
  first->name = name;
  followed = first;
  follows_any_ = true;
  holder_ = last_holder_ = first;
  acting_ = first;
}

void HostTurns::start() {
  current();
  const Guard guard(mutex_);
  if (is_started_) return;
  for (const auto& [id, entry] : threads_) entry->state = State::kOutside;
  holder_ = mine();
  if (holder_ != nullptr) {
    make_runnable(holder_, holder_->now);
    acting_ = last_holder_ = holder_;
  }
  is_started_ = true;
}

std::uint32_t HostTurns::announce(const char* name) {
  HostThread& parent = current();
  Guard guard(mutex_);
  if (Entry* const entry = mine(); entry != nullptr && is_started_) take(guard, entry);
  auto entry = std::make_unique<Entry>();
  entry->id = next_id_++;
  entry->name = name;
  entry->now = parent.now.load();
  entry->resumed = parent.resumed;
  entry->waited_for = parent.waited_for;
  entry->order_time = entry->now;
  entry->state = is_started_ ? State::kRunnable : State::kOutside;
  const std::uint32_t id = entry->id;
  threads_.emplace(id, std::move(entry));
  return id;
}

void HostTurns::attach(std::uint32_t id) {
  const Pause pause(*this);
  Guard guard(mutex_);
  const auto found = threads_.find(id);
  if (found == threads_.end()) return;
  followed = found->second.get();
  if (is_started_) take(guard, found->second.get());
}

void HostTurns::end() {
  Entry* const entry = mine();
  if (entry == nullptr) return;
  followed = nullptr;
  const Guard guard(mutex_);
  ended_.push_back({entry->id, entry->name, entry->now});
  const bool had_turn = holder_ == entry;
  const auto position = threads_.find(entry->id);
  const std::unique_ptr<Entry> kept = std::move(position->second);
  threads_.erase(position);
  if (threads_.empty()) return;
  if (last_holder_ == entry) last_holder_ = threads_.begin()->second.get();
  acting_ = last_holder_;
  if (had_turn) {
    holder_ = nullptr;
    if (is_started_) pass();
  }
}

void HostTurns::cancel(std::uint32_t id) {
  const Guard guard(mutex_);
  const auto found = threads_.find(id);
  if (found == threads_.end()) return;
  const bool had_turn = holder_ == found->second.get();
  threads_.erase(found);
  if (!had_turn) return;
  holder_ = nullptr;
  last_holder_ = threads_.begin()->second.get();
  acting_ = last_holder_;
  pass();
}

void HostTurns::make_runnable(Entry* entry, Nanoseconds order_time) {
  entry->state = State::kRunnable;
  entry->order_time = order_time;
}

// Who goes next: the earliest that can, or one whose wait is over before that.
HostTurns::Entry* HostTurns::next(const Entry* except) const {
  Entry* best = nullptr;
  for (const auto& [id, entry] : threads_) {
    if (entry->state != State::kRunnable || entry.get() == except) continue;
    if (best == nullptr || entry->order_time < best->order_time) best = entry.get();
  }
  if (best == nullptr) return nullptr;
  for (const auto& [id, entry] : threads_) {
    if (entry->state != State::kBlocked || !entry->is_timed) continue;
    const Nanoseconds time = best->state == State::kBlocked ? best->deadline : best->order_time;
    if (entry->deadline < time) best = entry.get();
  }
  return best;
}

// The turn is free: gives it to the next thread.
void HostTurns::pass() {
  holder_ = next();
  if (holder_ == nullptr) return;
  if (holder_->state == State::kBlocked) {
    holder_->timed_out = true;
    holder_->move_to(holder_->deadline);
    make_runnable(holder_, holder_->now);
  }
  last_holder_ = holder_;
  acting_ = holder_;
  holder_->turn.notify_all();
}

bool HostTurns::is_stuck() {
  const std::int64_t now_ns = read_clock(CLOCK_MONOTONIC);
  const std::int64_t cpu_ns = read_clock(CLOCK_PROCESS_CPUTIME_ID);
  const std::uint64_t progress = progress_.load(std::memory_order_relaxed);
  if (progress != seen_progress_ || seen_at_ns_ == 0) {
    seen_progress_ = progress;
    seen_cpu_ns_ = cpu_ns;
    seen_at_ns_ = now_ns;
    return false;
  }
  const std::int64_t silent_ns = now_ns - seen_at_ns_;
  const bool is_idle =
      silent_ns > kIdleNs && cpu_ns - seen_cpu_ns_ < silent_ns / 20 && !another_thread_is_ready();
  if (!is_idle && silent_ns < kSilentNs) return false;
  seen_at_ns_ = 0;
  return true;
}

// Waits for the turn for a moment. True when it has come.
bool HostTurns::wait_a_while(Guard& guard, Entry* entry) {
  if (holder_ == nullptr) pass();
  if (holder_ != entry) entry->turn.wait_for(guard, kSlice);
  if (holder_ == entry) return true;
  if (holder_ != nullptr && next(holder_) == entry && is_stuck()) {
    ++unseen_waits_;
    holder_->state = State::kOutside;
    holder_ = nullptr;
    pass();
  }
  return holder_ == entry;
}

// Waits until it is the thread's turn, which it may be already.
void HostTurns::take(Guard& guard, Entry* entry) {
  if (holder_ == entry) return;
  if (entry->state == State::kOutside) make_runnable(entry, entry->now);
  while (!wait_a_while(guard, entry)) {
  }
}

void HostTurns::yield() {
  yield(-1);
}

void HostTurns::yield(Nanoseconds order_time) {
  Entry* const entry = mine();
  if (entry == nullptr || !is_started_) return;
  {
    const Guard guard(mutex_);
    if (threads_.size() == 1 && holder_ == entry) return;
    if (holder_ == entry) {
      make_runnable(entry, order_time < 0 ? entry->now.load() : order_time);
      if (next() == entry) return;
      holder_ = nullptr;
      pass();
    }
  }
  const Pause pause(*this);
  Guard guard(mutex_);
  take(guard, entry);
}

// The thread itself, or whom an autograd worker acts for: that one waits for its backward pass, so
// what the pass waits for, it waits for.
HostTurns::Entry* HostTurns::waiting_entry() const {
  if (followed != nullptr) return mine();
  if (stood_for != nullptr) return static_cast<Entry*>(stood_for);
  thread_local const bool is_worker = is_autograd_worker();
  return is_worker ? holder_ : nullptr;
}

HostTurns::Outcome HostTurns::block(std::uint64_t token, Nanoseconds timeout) {
  if (!is_started_) return Outcome::kNotFollowed;
  const Pause pause(*this);
  Guard guard(mutex_);
  Entry* const entry = waiting_entry();
  if (entry == nullptr) return Outcome::kNotFollowed;
  if (followed == nullptr) stood_for = entry;
  const bool is_new = holder_ == entry || entry->state == State::kOutside;
  if (is_new) {
    progress_.fetch_add(1, std::memory_order_relaxed);
    take(guard, entry);
    entry->state = State::kBlocked;
    entry->token = token;
    entry->timed_out = false;
    entry->is_timed = timeout >= 0;
    entry->deadline = entry->now + std::max<Nanoseconds>(timeout, 0);
    entry->real_deadline_ns = read_clock(CLOCK_MONOTONIC) + timeout;
    holder_ = nullptr;
    pass();
  }
  if (!wait_a_while(guard, entry)) {
    // Where nobody else can go on, what is waited for comes from outside and takes real time.
    const bool is_over = entry->state == State::kBlocked && entry->is_timed && holder_ == nullptr &&
                         read_clock(CLOCK_MONOTONIC) >= entry->real_deadline_ns;
    if (!is_over) return Outcome::kPending;
    entry->timed_out = true;
    entry->move_to(entry->deadline);
    make_runnable(entry, entry->now);
    pass();
    take(guard, entry);
  }
  stood_for = nullptr;
  return entry->timed_out ? Outcome::kTimedOut : Outcome::kWoken;
}

void HostTurns::resume() {
  if (!is_started_) return;
  const Pause pause(*this);
  Guard guard(mutex_);
  Entry* const entry = waiting_entry();
  if (entry == nullptr) return;
  stood_for = nullptr;
  if (entry->state != State::kRunnable) make_runnable(entry, entry->now);
  take(guard, entry);
}

void HostTurns::wake(std::uint64_t token) {
  const Nanoseconds now = current().now;
  const Guard guard(mutex_);
  bool found = false;
  for (const auto& [id, entry] : threads_) {
    if (entry->state != State::kBlocked || entry->token != token) continue;
    entry->move_to(now);
    make_runnable(entry.get(), entry->now);
    found = true;
  }
  if (found && holder_ == nullptr && is_started_) pass();
}

Nanoseconds HostTurns::limit() {
  const Entry* const self = mine();
  if (self == nullptr || !is_started_) return kForever;
  const Guard guard(mutex_);
  Nanoseconds earliest = kForever;
  for (const auto& [id, entry] : threads_) {
    if (entry.get() == self) continue;
    if (entry->state == State::kRunnable) earliest = std::min(earliest, entry->order_time);
    if (entry->state == State::kBlocked && entry->is_timed) {
      earliest = std::min(earliest, entry->deadline);
    }
  }
  return earliest;
}

std::vector<Recorder::ThreadEntry> HostTurns::entries() {
  const Guard guard(mutex_);
  std::vector<Recorder::ThreadEntry> found = ended_;
  for (const auto& [id, entry] : threads_) found.push_back({id, entry->name, entry->now});
  std::sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.id < b.id; });
  return found;
}

std::uint64_t HostTurns::unseen_waits() {
  const Guard guard(mutex_);
  return unseen_waits_;
}

void HostTurns::set_interpreter(int (*release)(void**), void (*restore)(void*)) {
  const Guard guard(mutex_);
  release_interpreter_ = release;
  restore_interpreter_ = restore;
}

}  // namespace spillover::emulator
