#include "base/fork_generation.hpp"

#include <pthread.h>

#include <atomic>

namespace spillover {
namespace {

std::atomic<uint32_t> g_generation{0};

void note_fork_in_child() {
  g_generation.fetch_add(1, std::memory_order_relaxed);
}

}  // namespace

uint32_t fork_generation() noexcept {
  [[maybe_unused]] static const int watched = pthread_atfork(nullptr, nullptr, note_fork_in_child);
  return g_generation.load(std::memory_order_relaxed);
}

}  // namespace spillover
