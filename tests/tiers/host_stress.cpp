// Threads that allocate from one host pool until its budget is used up, free each other's buffers,
// reserve, trim and read figures, all at once: for the sanitizers (`make sanitize`). Built with the
// sources of base, driver, trace and tiers; prints what it did and fails at the first wrong answer.
//
// Usage: stress [rounds] [steps] [seed]
#include <array>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "base/bytes.hpp"
#include "base/error.hpp"
#include "tiers/host_pool.hpp"

#include "../stress_checks.hpp"

namespace {

using spillover::HostBuffer;
using spillover::HostPool;
using spillover::kKiB;
using spillover::kMiB;

constexpr int kThreads = 4;
constexpr size_t kLimitBytes = 24 * kMiB;
constexpr std::array<size_t, 9> kSizes{1,        100,      5000,     32 * kKiB, 40000,
                                       kMiB / 3, kMiB + 1, 3 * kMiB, 9 * kMiB};

std::atomic<long> g_allocated{0};
std::atomic<long> g_refused{0};
std::atomic<long> g_reserved{0};
std::atomic<long> g_stopped{0};

// A buffer whose ends are marked.
struct Held {
  HostBuffer buffer;
  uint8_t mark = 0;

  Held(HostBuffer taken, uint8_t with) : buffer(std::move(taken)), mark(with) {
    first() = std::byte{mark};
    last() = std::byte{mark};
  }
  Held(Held&&) = default;
  Held& operator=(Held&&) = default;
  std::byte& first() const { return buffer.address()[0]; }
  std::byte& last() const { return buffer.address()[buffer.size_bytes() - 1]; }
  void check() const {
    require(first() == std::byte{mark} && last() == std::byte{mark}, "a buffer was overwritten");
  }
};

// Buffers on their way from one thread to another.
class Mail {
 public:
  std::optional<Held> exchange(std::optional<Held> item, size_t slot) {
    const std::lock_guard lock(mutex_);
    std::swap(item, slots_[slot % slots_.size()]);
    return item;
  }

 private:
  std::mutex mutex_;
  std::array<std::optional<Held>, 16> slots_;
};

struct Stop {};

void reserve(HostPool& pool, unsigned draw) {
  const bool stops = draw % 3 == 0;
  try {
    pool.reserve(kSizes[draw % kSizes.size()], [&](size_t /*done_bytes*/) {
      if (stops) throw Stop();
    });
    ++g_reserved;
  } catch (const Stop&) {
    ++g_stopped;
  } catch (const spillover::HostOutOfMemoryError&) {
    ++g_refused;
  }
}

void run(HostPool& pool, Mail& mail, int steps, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<Held> held;
  for (int step = 0; step < steps; ++step) {
    try {
      held.emplace_back(pool.allocate(kSizes[random() % kSizes.size()]),
                        static_cast<uint8_t>(random()));
      ++g_allocated;
    } catch (const spillover::HostOutOfMemoryError&) {
      ++g_refused;
      held.clear();
    }
    while (held.size() > 12 || (!held.empty() && random() % 2 == 0)) {
      std::swap(held[random() % held.size()], held.back());
      held.back().check();
      std::optional<Held> received;
      if (random() % 4 == 0) received = mail.exchange(std::move(held.back()), random());
      held.pop_back();
      if (received) received->check();
    }
    if (step % 31 == 0) reserve(pool, random());
    if (step % 67 == 0) pool.trim();
    if (step % 7 == 0) require(pool.stats().reserved_bytes <= kLimitBytes, "over the limit");
    if (step % 41 == 0) require(pool.is_valid(), "the pool's equations do not hold");
  }
}

}  // namespace

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::atoi(arguments[1]) : 3;
  const int steps = count > 2 ? std::atoi(arguments[2]) : 1000;
  const auto seed = static_cast<unsigned>(count > 3 ? std::atoi(arguments[3]) : 1);
  for (int round = 0; round < rounds; ++round) {
    spillover::HostPoolOptions options;
    options.limit_bytes = kLimitBytes;
    options.region_bytes_max = 2 * kMiB;
    // Every other round without a driver in it, which is faster.
    options.pinning = round % 2 == 0 ? spillover::Pinning::kPinned : spillover::Pinning::kPageable;
    const std::shared_ptr<HostPool> pool = HostPool::create(options);
    {
      Mail mail;
      std::vector<std::thread> threads;
      for (int i = 0; i < kThreads; ++i) {
        const unsigned own_seed = seed * 1000 + static_cast<unsigned>(round * kThreads + i);
        threads.emplace_back([&, own_seed] { run(*pool, mail, steps, own_seed); });
      }
      for (std::thread& thread : threads) thread.join();
    }
    require(pool->stats().used_bytes == 0 && pool->stats().buffer_count == 0, "a buffer is left");
    require(pool->is_valid(), "the pool's equations do not hold at the end");
    pool->trim();
    require(pool->stats().reserved_bytes == 0, "memory is left after trim()");
  }
  std::printf("%ld buffers, %ld refused, %ld reservations, %ld stopped\n", g_allocated.load(),
              g_refused.load(), g_reserved.load(), g_stopped.load());
  return 0;
}
