// Threads that come and go, with streams of their own that do as well, allocate until memory runs
// out, free each other's blocks, note streams, trim and read figures, all at once, while another
// one puts a tag to sleep and wakes it: for the sanitizers (`make sanitize`). Built with the
// sources of base, driver, allocator, tiers and transfer; prints what it did and fails at the first
// wrong answer.
//
// Usage: stress [rounds] [steps] [seed]
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "allocator/c_api.h"
#include "driver/context.hpp"
#include "driver/stream.hpp"
#include "transfer/c_api.h"

#include "../stress_driver.hpp"

namespace {

constexpr int kThreads = 4;
constexpr size_t kLastingStreams = 3;
constexpr size_t kHeldMax = 24;
constexpr size_t kMib = size_t{1} << 20;
constexpr std::array<size_t, 8> kSizes{1,        512,      700,          40000,
                                       kMib / 3, kMib + 1, 2 * kMib + 7, 9 * kMib};
// Shares of the device that the pool may hold, one after the other: with the smallest the threads
// run out of memory.
constexpr std::array<double, 3> kFractions{1.0, 0.25, 0.1};

// Blocks on their way from one thread to another.
std::array<std::atomic<void*>, 64> g_mail{};
// The legacy default stream, two that the pool was told of, and the handle of each thread's own
// default stream.
std::array<void*, kLastingStreams + 1> g_streams{};
std::array<uint32_t, 3> g_tags{};
// The last of them is the one that sleeps. Who allocates with it uses the block at once, which
// nobody may do from the beginning of a sleep on: both hold the mutex.
constexpr size_t kSleeper = 2;
std::mutex g_sleeper_mutex;
std::atomic<bool> g_is_asleep{false};
std::atomic<long> g_allocated{0};
std::atomic<long> g_refused{0};
std::atomic<long> g_slept{0};
std::atomic<long> g_cannot_wake{0};
std::atomic<int> g_working{0};

// Gives the stream something to do with the block.
void write(void* block, size_t size_bytes, void* stream, unsigned char value = 1) {
  using Memset = int (*)(uint64_t, unsigned char, size_t, void*);
  static const auto memset_async = driver_function<Memset>("cuMemsetD8Async");
  const auto address = reinterpret_cast<uint64_t>(block);
  require(memset_async(address, value, size_bytes, stream) == 0, "cuMemsetD8Async failed");
}

void require_contents(const void* block, size_t size_bytes, unsigned char value) {
  using Copy = int (*)(void*, uint64_t, size_t);
  static const auto copy = driver_function<Copy>("cuMemcpyDtoH_v2");
  std::vector<unsigned char> found(size_bytes);
  require(copy(found.data(), reinterpret_cast<uint64_t>(block), size_bytes) == 0,
          "cuMemcpyDtoH failed");
  require(found == std::vector<unsigned char>(size_bytes, value),
          "what has slept has not come back as it was");
}

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

void visit_nothing(void* /*user*/, const spillover_segment_info* /*segment*/,
                   const spillover_block_info* /*blocks*/) {}

void read_figures(unsigned draw) {
  spillover_stats_t stats{};
  size_t largest_bytes = 0;
  switch (draw % 9) {
    case 0:
      return require(spillover_stats(0, &stats), "spillover_stats");
    case 1:
      return require(spillover_largest_free(0, &largest_bytes), "spillover_largest_free");
    case 2:
      return require(spillover_trim(0, 0), "spillover_trim");
    case 3:
      return require(spillover_reset_peak_stats(0), "spillover_reset_peak_stats");
    case 4:
      return require(spillover_reset_accumulated_stats(0), "spillover_reset_accumulated_stats");
    case 5:
      return require(spillover_set_memory_fraction(0, kFractions[draw / 9 % kFractions.size()]),
                     "spillover_set_memory_fraction");
    case 6:
      return require(spillover_visit_segments(0, visit_nothing, nullptr), "visiting segments");
    default:
      return require(spillover_check_invariants(0), "spillover_check_invariants");
  }
}

// A thread's own stream and blocks.
class Worker {
 public:
  explicit Worker(unsigned seed) : random_(seed) {}

  void run(int steps) {
    for (int step = 0; step < steps; ++step) {
      // Its work goes on, and the next one has its handle.
      if (random_() % 64 == 0) stream_ = std::make_unique<spillover::Stream>(0);
      if (random_() % 32 == 0) {
        tag_ = random_() % g_tags.size();
        require(spillover_set_tag(g_tags[tag_], nullptr), "spillover_set_tag");
      }
      allocate();
      while (held_.size() > kHeldMax || (!held_.empty() && random_() % 2 == 0)) free_one();
      if (step % 97 == 0) read_figures(random_());
    }
    // Some blocks outlive the thread and its stream, and what it keeps ends with it.
    while (held_.size() > 2) free_one();
    for (void* block : held_) free_block(mail(block), random_());
  }

 private:
  void* any_stream() {
    const size_t draw = random_() % (g_streams.size() + 1);
    return draw < g_streams.size() ? g_streams[draw] : stream_->handle();
  }

  void* mail(void* block) {
    return g_mail[random_() % g_mail.size()].exchange(block, std::memory_order_acq_rel);
  }

  void allocate() {
    void* const stream = any_stream();
    const size_t size_bytes = kSizes[random_() % kSizes.size()];
    void* block = nullptr;
    std::unique_lock<std::mutex> awake;
    if (tag_ == kSleeper) awake = std::unique_lock(g_sleeper_mutex);
    const spillover_status status = spillover_alloc(0, size_bytes, stream, &block);
    if (status == SPILLOVER_OUT_OF_MEMORY) {
      ++g_refused;
    } else if (status != SPILLOVER_BROKEN_STATE || tag_ != kSleeper ||
               std::strstr(spillover_last_error(), "sleeps on device 0") == nullptr) {
      require(status, "spillover_alloc");
      ++g_allocated;
      write(block, std::min(size_bytes, size_t{4096}), stream);
      if (random_() % 16 == 0) {
        require(spillover_record_stream(block, any_stream()), "spillover_record_stream");
      }
    }
    if (awake) awake.unlock();
    if (random_() % 2 == 0) block = mail(block);
    if (block != nullptr) held_.push_back(block);
  }

  void free_one() {
    std::swap(held_[random_() % held_.size()], held_.back());
    free_block(held_.back(), random_());
    held_.pop_back();
  }

  const spillover::ContextScope scope_{0};
  std::mt19937 random_;
  size_t tag_ = 0;
  std::unique_ptr<spillover::Stream> stream_ = std::make_unique<spillover::Stream>(0);
  std::vector<void*> held_;
};

void work(unsigned seed, int steps) {
  Worker(seed).run(steps);
  --g_working;
}

// Looks on without blocks of its own, as a monitor does.
void observe(unsigned seed) {
  std::mt19937 random(seed);
  while (g_working > 0) {
    read_figures(random());
    std::this_thread::yield();
  }
}

// Puts a tag to sleep and wakes it, with blocks of its own in it that must stay as they are. Where
// the others leave no memory to wake, it sleeps on.
void sleep_and_wake(unsigned seed) {
  const spillover::ContextScope scope{0};
  std::mt19937 random(seed);
  const uint32_t tag = g_tags[kSleeper];
  std::array<void*, kSizes.size()> own{};
  spillover_content_store* const store = spillover_make_host_store(SIZE_MAX, 0);
  require(spillover_set_tag(tag, nullptr), "spillover_set_tag");
  for (size_t i = 0; i < own.size(); ++i) {
    const spillover_status status = spillover_alloc(0, kSizes[i], nullptr, &own[i]);
    if (status != SPILLOVER_OUT_OF_MEMORY) require(status, "spillover_alloc");
    if (own[i] != nullptr) write(own[i], kSizes[i], nullptr, static_cast<unsigned char>(i + 2));
  }
  const auto wake = [&] {
    const spillover_status status = spillover_wake(0, &tag, 1, nullptr);
    if (status == SPILLOVER_OUT_OF_MEMORY) {
      ++g_cannot_wake;
      return false;
    }
    require(status, "spillover_wake");
    g_is_asleep = false;
    return true;
  };
  while (g_working > 0) {
    {
      const std::lock_guard lock(g_sleeper_mutex);
      g_is_asleep = true;
      require(spillover_sleep(0, &tag, 1, store, nullptr), "spillover_sleep");
    }
    ++g_slept;
    for (unsigned pause = random() % 16; pause > 0; --pause) std::this_thread::yield();
    while (!wake() && g_working > 0) std::this_thread::yield();
    if (g_is_asleep) break;
    for (size_t i = 0; i < own.size(); ++i) {
      if (own[i] == nullptr) continue;
      require_contents(own[i], kSizes[i], static_cast<unsigned char>(i + 2));
    }
  }
  for (void* block : own) free_block(block, random());
  spillover_release_store(store);
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 4;
  const int steps = argc > 2 ? std::atoi(argv[2]) : 1500;
  const auto seed = static_cast<unsigned>(argc > 3 ? std::atoi(argv[3]) : 1);
  std::vector<spillover::Stream> kept;
  for (size_t i = 1; i < kLastingStreams; ++i) {
    kept.emplace_back(0);
    g_streams[i] = kept.back().handle();
    require(spillover_keep_stream(0, kept.back().handle()), "spillover_keep_stream");
  }
  require(spillover_tag("of some threads", &g_tags[1]), "spillover_tag");
  require(spillover_tag("sleeps now and then", &g_tags[kSleeper]), "spillover_tag");
  g_streams[kLastingStreams] = reinterpret_cast<void*>(2);
  require(spillover_configure(0, "check_every=16"), "spillover_configure");
  for (int round = 0; round < rounds; ++round) {
    const double fraction = kFractions[static_cast<size_t>(round) % kFractions.size()];
    require(spillover_set_memory_fraction(0, fraction), "spillover_set_memory_fraction");
    std::vector<std::thread> threads;
    g_working = kThreads;
    for (int i = 0; i < kThreads; ++i) {
      threads.emplace_back(work, seed + static_cast<unsigned>(round * kThreads + i), steps);
    }
    threads.emplace_back(observe, seed);
    threads.emplace_back(sleep_and_wake, seed);
    for (std::thread& thread : threads) thread.join();
    require(spillover_check_invariants(0), "spillover_check_invariants");
    if (!g_is_asleep) continue;
    // Nobody holds it up any more but blocks that are on their way.
    require(spillover_set_memory_fraction(0, 1.0), "spillover_set_memory_fraction");
    require(spillover_wake(0, &g_tags[kSleeper], 1, nullptr), "spillover_wake");
    g_is_asleep = false;
  }
  for (auto& slot : g_mail) free_block(slot.exchange(nullptr), 1);
  require(spillover_trim(0, 0), "spillover_trim");
  spillover_stats_t stats{};
  require(spillover_stats(0, &stats), "spillover_stats");
  std::printf(
      "%ld allocated, %ld refused for want of memory; %ld sleeps, %ld wakings refused; "
      "%lld blocks and %lld bytes left\n",
      g_allocated.load(), g_refused.load(), g_slept.load(), g_cannot_wake.load(),
      static_cast<long long>(stats.allocation[SPILLOVER_CLASS_ALL].current),
      static_cast<long long>(stats.reserved_bytes[SPILLOVER_CLASS_ALL].current));
  const bool is_clean = stats.allocation[SPILLOVER_CLASS_ALL].current == 0 &&
                        stats.active[SPILLOVER_CLASS_ALL].current == 0 &&
                        stats.reserved_bytes[SPILLOVER_CLASS_ALL].current == 0;
  std::fflush(stdout);
  // The kept streams may not be destroyed.
  std::_Exit(is_clean ? 0 : 1);
}
