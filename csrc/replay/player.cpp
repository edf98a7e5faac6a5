// Plays a trace on an allocator (c_api.h).
//
// Note [One event at a time]: events of several threads keep the order of the trace, so a replay is
// the same in every run. A thread waits until the event before its own is over; only the call
// itself is timed, so the waiting does not count.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "replay/c_api.h"

namespace spillover {
namespace {

class Player {
 public:
  Player(const spillover_replay_target& target, const spillover_replay_job& job)
      : target_(target), job_(job), blocks_(job.block_count, nullptr) {}

  std::size_t run() {
    std::vector<std::thread> threads;
    for (std::size_t i = 1; i < job_.thread_count; ++i) {
      threads.emplace_back([this, i] { play(i); });
    }
    play(0);
    for (std::thread& thread : threads) thread.join();
    return played_;
  }

  const std::string& error() const { return error_; }

 private:
  // Past every event: ends all threads.
  static constexpr std::size_t kStopped = std::numeric_limits<std::size_t>::max();

  void play(std::size_t thread) {
    for (std::size_t i = 0; i < job_.event_count; ++i) {
      if (job_.events[i].thread != thread) continue;
      if (!wait_for(i)) return;
      if (!step(i)) {
        next_.store(kStopped);
        next_.notify_all();
        return;
      }
      played_ = i + 1;
      next_.store(i + 1, std::memory_order_release);
      const bool is_handed_on = i + 1 < job_.event_count && job_.events[i + 1].thread != thread;
      if (is_handed_on) next_.notify_all();
    }
  }

  bool wait_for(std::size_t event) {
    std::size_t next = next_.load(std::memory_order_acquire);
    while (next != event) {
      if (next == kStopped) return false;
      next_.wait(next, std::memory_order_acquire);
      next = next_.load(std::memory_order_acquire);
    }
    return true;
  }

  bool step(std::size_t index) {
    if (job_.sample_every != 0 && index % job_.sample_every == 0) {
      job_.reserved_bytes[index / job_.sample_every] = target_.reserved_bytes();
    }
    const auto begin = std::chrono::steady_clock::now();
    const int status = perform(job_.events[index]);
    const auto elapsed = std::chrono::steady_clock::now() - begin;
    const auto nanoseconds = std::chrono::duration_cast<std::chrono::nanoseconds>(elapsed).count();
    job_.latency_ns[index] = static_cast<std::uint32_t>(
        std::min<std::int64_t>(nanoseconds, std::numeric_limits<std::uint32_t>::max()));
    if (status != 0) error_ = target_.last_error();
    return status == 0;
  }

  int perform(const spillover_replay_event& event) {
    void*& block = blocks_[event.block];
    switch (event.kind) {
      case SPILLOVER_REPLAY_ALLOC:
        return target_.allocate(event.size_bytes, job_.streams[event.stream], &block);
      case SPILLOVER_REPLAY_FREE:
        return target_.free(block);
      default:
        return target_.record_stream(block, job_.streams[event.stream]);
    }
  }

  const spillover_replay_target& target_;
  const spillover_replay_job& job_;
  // Handed from thread to thread by next_.
  std::vector<void*> blocks_;
  std::string error_;
  std::size_t played_ = 0;
  std::atomic<std::size_t> next_{0};
};

}  // namespace
}  // namespace spillover

extern "C" size_t spillover_replay_run(const spillover_replay_target* target,
                                       const spillover_replay_job* job, char* error,
                                       size_t capacity) {
  spillover::Player player(*target, *job);
  const std::size_t played = player.run();
  if (capacity > 0) {
    const std::size_t length = std::min(player.error().size(), capacity - 1);
    std::memcpy(error, player.error().data(), length);
    error[length] = '\0';
  }
  return played;
}
