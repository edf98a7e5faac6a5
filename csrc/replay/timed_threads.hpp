// Runs one body on several threads at once and measures it from a common start.
#pragma once

#include <atomic>
#include <barrier>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

namespace spillover {

// prepare() and then body() run on each thread, both -> bool; the time is that of the bodies, from
// before the first begins to after the last ends. Returns 0 where one of them said false.
template <typename Prepare, typename Body>
std::uint64_t run_timed(std::size_t thread_count, const Prepare& prepare, const Body& body) {
  std::barrier ready(static_cast<std::ptrdiff_t>(thread_count) + 1);
  std::atomic<bool> works{true};
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < thread_count; ++i) {
    threads.emplace_back([&] {
      if (!prepare()) works = false;
      ready.arrive_and_wait();
      if (works && !body()) works = false;
    });
  }
  // Nobody can pass the barrier before this thread, so the time is taken before any body begins.
  const auto begin = std::chrono::steady_clock::now();
  std::atomic_signal_fence(std::memory_order_seq_cst);
  ready.arrive_and_wait();
  for (std::thread& thread : threads) thread.join();
  const auto elapsed = std::chrono::steady_clock::now() - begin;
  if (!works) return 0;
  return static_cast<std::uint64_t>(
      std::chrono::duration_cast<std::chrono::nanoseconds>(elapsed).count());
}

}  // namespace spillover
