// What this process may do with the emulated device: nothing before cuInit, everything after it,
// and nothing in a child that was forked after it. Reading the state is one atomic load, so a
// forked child gets its error without touching a lock that some thread of its parent may have held.
#pragma once

#include <atomic>

namespace spillover::emulator {

enum class ProcessState : int { kFresh, kReady, kForked };

namespace internal {
extern std::atomic<int> process_state;
}

inline ProcessState process_state() {
  return static_cast<ProcessState>(internal::process_state.load(std::memory_order_acquire));
}

inline bool process_ready() {
  return process_state() == ProcessState::kReady;
}

// From here on the process is ready, and children that it forks are not.
void mark_process_ready();

// True while this thread runs a host function or a kernel's body, which must not call CUDA.
bool in_callback();

// Marks the scope in which this thread runs one.
class CallbackScope {
 public:
  CallbackScope();
  ~CallbackScope();
  CallbackScope(const CallbackScope&) = delete;
  CallbackScope& operator=(const CallbackScope&) = delete;

 private:
  const bool previous_;  // callbacks nest where one waits by itself for another stream's
};

}  // namespace spillover::emulator
