#include "driver/fork_guard.hpp"

#include <pthread.h>
#include <unistd.h>

#include <atomic>

#include "base/error.hpp"

namespace spillover {
namespace {

// The process that loaded the driver, 0 before. A fork handler compares it with the new process, as
// asking for the process's id at each call would cost a system call.
std::atomic<pid_t> g_owner{0};
std::atomic<bool> g_is_forked_child{false};

void note_fork_in_child() {
  const pid_t owner = g_owner.load(std::memory_order_relaxed);
  if (owner != 0 && owner != getpid()) g_is_forked_child.store(true, std::memory_order_relaxed);
}

}  // namespace

bool in_forked_child() noexcept {
  return g_is_forked_child.load(std::memory_order_relaxed);
}

void check_not_forked() {
  if (in_forked_child()) {
    throw StateError(
        "CUDA cannot be used in a forked child of a process that has initialised it; start workers "
        "with the 'spawn' method, or fork before the first CUDA call");
  }
}

void watch_forks() {
  pid_t expected = 0;
  if (g_owner.compare_exchange_strong(expected, getpid())) {
    pthread_atfork(nullptr, nullptr, note_fork_in_child);
  }
}

}  // namespace spillover
