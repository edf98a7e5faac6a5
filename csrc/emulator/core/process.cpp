#include "emulator/core/process.hpp"

#include <pthread.h>

#include <mutex>

namespace spillover::emulator {
namespace {

thread_local bool in_callback_flag = false;

void after_fork_in_child() {
  if (process_ready()) {
    internal::process_state.store(static_cast<int>(ProcessState::kForked),
                                  std::memory_order_release);
  }
}

}  // namespace

namespace internal {
std::atomic<int> process_state{static_cast<int>(ProcessState::kFresh)};
}

void mark_process_ready() {
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, after_fork_in_child); });
  internal::process_state.store(static_cast<int>(ProcessState::kReady), std::memory_order_release);
}

bool in_callback() {
  return in_callback_flag;
}

CallbackScope::CallbackScope() : previous_(in_callback_flag) {
  in_callback_flag = true;
}
CallbackScope::~CallbackScope() {
  in_callback_flag = previous_;
}

}  // namespace spillover::emulator
