// Threads put payloads of all sizes, fetch them, wait, ask, cancel and drop, say what is used next
// and collect, all at once, on one engine with little host memory and a disk, while another thread
// reads figures and synchronises; in the end the engine is closed under them. For the sanitizers
// (`make sanitize`). Built with the sources of base, driver, trace, tiers and transfer; prints what
// it did and fails at the first byte that is wrong.
//
// Usage: stress [rounds] [steps] [seed]
#include <dlfcn.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/error.hpp"
#include "driver/context.hpp"
#include "driver/device_memory.hpp"
#include "driver/stream.hpp"
#include "tiers/disk_store.hpp"
#include "tiers/host_pool.hpp"
#include "transfer/transfer_engine.hpp"

#include "../stress_driver.hpp"

namespace {

using spillover::DeviceMemory;
using spillover::Payload;
using spillover::TransferEngine;
using spillover::TransferTicket;

constexpr unsigned kThreads = 3;
constexpr size_t kKib = 1024;
constexpr size_t kHeldMax = 12;
constexpr std::array<size_t, 6> kSizes{1, 700, 4 * kKib, 16 * kKib, 40 * kKib + 3, 150 * kKib};

std::atomic<long> g_put{0};
std::atomic<long> g_fetched{0};
std::atomic<long> g_cancelled{0};
std::atomic<unsigned> g_working{0};

void fill(const DeviceMemory& memory, unsigned char value, const spillover::Stream& stream) {
  using Memset = int (*)(uint64_t, unsigned char, size_t, void*);
  static const auto memset_async = driver_function<Memset>("cuMemsetD8Async");
  require(memset_async(memory.address(), value, memory.size_bytes(), stream.handle()) == 0,
          "cuMemsetD8Async failed");
}

void require_contents(const DeviceMemory& memory, unsigned char value,
                      const spillover::Stream& stream) {
  using Copy = int (*)(void*, uint64_t, size_t, void*);
  static const auto copy = driver_function<Copy>("cuMemcpyDtoHAsync_v2");
  std::vector<unsigned char> found(memory.size_bytes());
  require(copy(found.data(), memory.address(), found.size(), stream.handle()) == 0,
          "cuMemcpyDtoHAsync failed");
  stream.synchronize();
  require(found == std::vector<unsigned char>(found.size(), value), "a payload has changed");
}

struct Kept {
  std::shared_ptr<Payload> payload;
  std::shared_ptr<TransferTicket> ticket;
  unsigned char value = 0;
};

// One thread's stream and payloads. Ends early where the engine is closed.
class Worker {
 public:
  Worker(TransferEngine& engine, unsigned seed) : engine_(engine), random_(seed) {}
  ~Worker() {
    for (const Kept& kept : kept_) engine_.drop(kept.payload);
  }
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  void run(int steps) {
    try {
      for (int step = 0; step < steps; ++step) act();
    } catch (const spillover::StateError&) {
      // Closed.
    }
  }

 private:
  std::shared_ptr<DeviceMemory> allocate(size_t size_bytes) {
    auto memory = DeviceMemory::try_allocate(0, size_bytes);
    require(memory.has_value(), "the device is full");
    return std::make_shared<DeviceMemory>(std::move(*memory));
  }

  void act() {
    switch (kept_.empty() ? 0 : random_() % 12) {
      case 0:
      case 1:
      case 2:
        return put();
      case 3:
      case 4:
      case 5:
        return fetch();
      case 6:
        return cancel();
      case 7:
        engine_.set_next_use(any().payload, random_() % 100);
        return engine_.advance(random_() % 100);
      case 8:
        engine_.collect(random_() % 2 == 0 ? 0 : SIZE_MAX);
        return static_cast<void>(engine_.take_released());
      case 9:
        if (any().ticket->is_done()) any().ticket->wait();
        return static_cast<void>(engine_.describe(any().payload));
      default:
        return drop(random_() % kept_.size());
    }
  }

  Kept& any() { return kept_[random_() % kept_.size()]; }

  void drop(size_t index) {
    engine_.drop(kept_[index].payload);
    kept_.erase(kept_.begin() + static_cast<std::ptrdiff_t>(index));
  }

  void put() {
    std::vector<spillover::PutSource> sources;
    std::vector<unsigned char> values;
    for (unsigned i = random_() % 3 + 1; i > 0; --i) {
      const auto memory = allocate(kSizes[random_() % kSizes.size()]);
      values.push_back(static_cast<unsigned char>(random_()));
      fill(*memory, values.back(), stream_);
      sources.push_back({{memory->address(), memory->size_bytes(), memory},
                         random_() % 2 == 0 ? Payload::kNoUse : random_() % 100});
    }
    auto result = engine_.put(std::move(sources), stream_.handle());
    for (size_t i = 0; i < values.size(); ++i)
      kept_.push_back({result.payloads[i], result.ticket, values[i]});
    ++g_put;
    while (kept_.size() > kHeldMax) drop(random_() % kept_.size());
  }

  std::shared_ptr<TransferTicket> start(const Kept& kept,
                                        const std::shared_ptr<DeviceMemory>& target) {
    return engine_.fetch({{kept.payload, {target->address(), target->size_bytes(), target}}},
                         stream_.handle(), static_cast<int>(random_() % 3));
  }

  void fetch() {
    const Kept kept = any();
    const auto target = allocate(kept.payload->size_bytes);
    const auto ticket = start(kept, target);
    if (random_() % 2 == 0)
      ticket->put_before(stream_.handle());
    else
      ticket->wait();
    require_contents(*target, kept.value, stream_);
    ++g_fetched;
  }

  void cancel() {
    const Kept kept = any();
    const auto ticket = start(kept, allocate(kept.payload->size_bytes));
    if (engine_.cancel(ticket)) ++g_cancelled;
  }

  TransferEngine& engine_;
  std::mt19937 random_;
  spillover::Stream stream_{0};
  std::vector<Kept> kept_;
};

void work(TransferEngine& engine, unsigned seed, int steps) {
  const spillover::ContextScope scope{0};
  Worker(engine, seed).run(steps);
  --g_working;
}

// Looks on, as a monitor does, and lets go of memory.
void observe(TransferEngine& engine) {
  const spillover::ContextScope scope{0};
  try {
    while (g_working > 0) {
      require(engine.stats().leaving_bytes < SIZE_MAX / 2, "more was let go of than was held");
      engine.synchronize();
      engine.take_released();
      std::this_thread::yield();
    }
  } catch (const spillover::StateError&) {
    // Closed.
  }
}

void run_round(spillover::DiskStore& store, unsigned seed, int steps, bool closes_early) {
  spillover::TransferOptions options;
  options.host_bytes_max = 128 * kKib;
  options.staging_bytes = 64 * kKib;
  options.chunk_bytes = 16 * kKib;
  options.leaving_bytes_max = 256 * kKib;
  options.prefetch_bytes = 64 * kKib;
  const auto engine = TransferEngine::create(options, spillover::HostPool::create({}), &store);
  g_working = kThreads;
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < kThreads; ++i)
    threads.emplace_back([&, i] { work(*engine, seed + i, steps); });
  threads.emplace_back([&] { observe(*engine); });
  if (closes_early) {
    const long until = g_put + steps / 8;
    while (g_put < until && g_working > 0) std::this_thread::yield();
    engine->close();
  }
  for (std::thread& thread : threads) thread.join();
  engine->close();
  engine->take_released();
  const spillover::TransferStats stats = engine->stats();
  require(stats.leaving_bytes == 0 && stats.host_bytes == 0 && stats.dirty_bytes == 0,
          "something is left");
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 2;
  const int steps = argc > 2 ? std::atoi(argv[2]) : 600;
  const auto seed = static_cast<unsigned>(argc > 3 ? std::atoi(argv[3]) : 1);
  std::string folder =
      (std::filesystem::temp_directory_path() / "spillover-stress-XXXXXX").string();
  require(mkdtemp(folder.data()) != nullptr, "no temporary folder can be made");
  for (const auto kind : {spillover::DiskEngineKind::kThreads, spillover::DiskEngineKind::kAuto}) {
    spillover::DiskStoreOptions options;
    options.folders = {folder};
    options.engine = kind;
    spillover::DiskStore store(options);
    for (int round = 0; round < rounds; ++round)
      run_round(store, seed + static_cast<unsigned>(round) * kThreads, steps, round % 2 == 1);
    require(store.stats().used_bytes == 0, "something is left on the disk");
  }
  std::filesystem::remove_all(folder);
  std::printf("%ld put, %ld fetched, %ld fetches cancelled\n", g_put.load(), g_fetched.load(),
              g_cancelled.load());
  return 0;
}
