// Pairs of an allocation and a free, on one thread or several (c_api.h).
#include "replay/c_api.h"
#include "replay/timed_threads.hpp"

extern "C" uint64_t spillover_replay_pairs(const spillover_replay_target* target, size_t size_bytes,
                                           size_t thread_count, size_t pair_count) {
  const auto run = [&](std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) {
      void* block = nullptr;
      if (target->allocate(size_bytes, nullptr, &block) != 0) return false;
      if (target->free(block) != 0) return false;
    }
    return true;
  };
  // The first pairs get memory from the driver and make what the thread keeps.
  const std::size_t warm_up_count = pair_count / 16 + 1;
  return spillover::run_timed(
      thread_count, [&] { return run(warm_up_count); }, [&] { return run(pair_count); });
}
