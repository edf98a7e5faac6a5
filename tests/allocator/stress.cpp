// Threads that come and go, allocate, free each other's blocks, note streams, trim and read figures,
// all at once: for the sanitizers (`make sanitize`), and in the tests without them. Built with the
// sources of base, driver and allocator; prints what it did and fails at the first wrong answer.
#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "allocator/c_api.h"
#include "driver/context.hpp"
#include "driver/stream.hpp"

namespace {

constexpr int kThreads = 4;
constexpr int kStreams = 4;
constexpr size_t kMib = size_t{1} << 20;
constexpr std::array<size_t, 8> kSizes{1,        512,      700,          40000,
                                       kMib / 3, kMib + 1, 2 * kMib + 7, 9 * kMib};

// Blocks on their way from one thread to another.
std::array<std::atomic<void*>, 64> g_mail{};
std::array<void*, kStreams> g_streams{};
std::atomic<long> g_allocated{0};
std::atomic<long> g_refused{0};

void require(spillover_status status, const char* what) {
  if (status == SPILLOVER_OK) return;
  std::fprintf(stderr, "%s failed: %s\n", what, spillover_last_error());
  std::exit(1);
}

void free_block(void* block, unsigned draw) {
  if (block == nullptr) return;
  if (draw % 2 == 0) {
    const spillover_status status = spillover_try_free(block);
    if (status == SPILLOVER_OK) return;
    if (status != SPILLOVER_BUSY) require(status, "spillover_try_free");
  }
  require(spillover_free(block), "spillover_free");
}

void read_figures(unsigned draw) {
  spillover_stats_t stats{};
  size_t largest_bytes = 0;
  switch (draw % 6) {
    case 0:
      return require(spillover_stats(0, &stats), "spillover_stats");
    case 1:
      return require(spillover_largest_free(0, &largest_bytes), "spillover_largest_free");
    case 2:
      return require(spillover_trim(0, 0), "spillover_trim");
    case 3:
      return require(spillover_reset_peak_stats(0), "spillover_reset_peak_stats");
    default:
      return require(spillover_check_invariants(0), "spillover_check_invariants");
  }
}

void work(unsigned seed, int steps) {
  const spillover::ContextScope scope(0);
  std::mt19937 random(seed);
  std::vector<void*> held;
  for (int step = 0; step < steps; ++step) {
    void* const stream = g_streams[random() % kStreams];
    void* block = nullptr;
    const spillover_status status =
        spillover_alloc(0, kSizes[random() % kSizes.size()], stream, &block);
    if (status == SPILLOVER_OUT_OF_MEMORY) {
      ++g_refused;
    } else {
      require(status, "spillover_alloc");
      ++g_allocated;
    }
    if (block != nullptr && random() % 16 == 0) {
      require(spillover_record_stream(block, g_streams[random() % kStreams]),
              "spillover_record_stream");
    }
    if (random() % 2 == 0) {
      block = g_mail[random() % g_mail.size()].exchange(block, std::memory_order_acq_rel);
    }
    if (block != nullptr) held.push_back(block);
    while (held.size() > 24 || (!held.empty() && random() % 2 == 0)) {
      std::swap(held[random() % held.size()], held.back());
      free_block(held.back(), random());
      held.pop_back();
    }
    if (step % 97 == 0) read_figures(random());
  }
  for (void* block : held) free_block(block, random());
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 4;
  const int steps = argc > 2 ? std::atoi(argv[2]) : 1500;
  const auto seed = static_cast<unsigned>(argc > 3 ? std::atoi(argv[3]) : 1);
  // The legacy default stream, two that the pool is told of, and one that it is not.
  std::vector<spillover::Stream> streams;
  for (int i = 1; i < kStreams; ++i) {
    streams.emplace_back(0);
    g_streams[static_cast<size_t>(i)] = streams.back().handle();
    if (i < kStreams - 1) require(spillover_keep_stream(0, streams.back().handle()), "keeping");
  }
  for (int round = 0; round < rounds; ++round) {
    std::vector<std::thread> threads;
    for (int i = 0; i < kThreads; ++i) {
      threads.emplace_back(work, seed + static_cast<unsigned>(round * kThreads + i), steps);
    }
    for (std::thread& thread : threads) thread.join();
    require(spillover_check_invariants(0), "spillover_check_invariants");
  }
  for (auto& slot : g_mail) free_block(slot.exchange(nullptr), 1);
  require(spillover_trim(0, 0), "spillover_trim");
  spillover_stats_t stats{};
  require(spillover_stats(0, &stats), "spillover_stats");
  std::printf("%ld allocated, %ld refused for want of memory; %lld blocks and %lld bytes left\n",
              g_allocated.load(), g_refused.load(),
              static_cast<long long>(stats.allocation[SPILLOVER_CLASS_ALL].current),
              static_cast<long long>(stats.reserved_bytes[SPILLOVER_CLASS_ALL].current));
  const bool is_clean = stats.allocation[SPILLOVER_CLASS_ALL].current == 0 &&
                        stats.active[SPILLOVER_CLASS_ALL].current == 0 &&
                        stats.reserved_bytes[SPILLOVER_CLASS_ALL].current == 0;
  std::fflush(stdout);
  // The kept streams may not be destroyed.
  std::_Exit(is_clean ? 0 : 1);
}
