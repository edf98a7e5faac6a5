// Threads that write and read payloads of one disk store, register memory and give it back, while
// transfers are short, late, wrong and failing by a seeded plan; the store is closed while they do.
// With each engine, for the sanitizers (`make sanitize`). Built with the sources of base, driver,
// trace and tiers; fails at the first wrong byte, error or figure.
//
// Usage: stress ROUNDS STEPS SEED
#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/error.hpp"
#include "tiers/disk_store.hpp"
#include "tiers/extent_io.hpp"
#include "tiers/storage_faults.hpp"

#include "../stress_checks.hpp"

namespace {

using namespace spillover;

constexpr size_t kThreads = 3;
constexpr size_t kSlots = 5;  // Of each thread.
constexpr size_t kSlotBytes = size_t{6} << 20;
constexpr std::array<size_t, 7> kSizes{1, 1000, 4096, 300'000, 1'048'576, 3'145'729, 5'500'000};

std::atomic<long> g_written{0};
std::atomic<long> g_read{0};
std::atomic<long> g_failed{0};

std::vector<StorageFault> plan() {
  const auto often = [](const char* operation, StorageFaultKind kind, double probability,
                        int native_error = 0, uint64_t delay_us = 0) {
    StorageFault fault{operation, kind, native_error};
    fault.times = 0;
    fault.probability = probability;
    fault.delay_us = delay_us;
    return fault;
  };
  return {often("write", StorageFaultKind::kShort, 0.1),
          often("read", StorageFaultKind::kShort, 0.1),
          often("write", StorageFaultKind::kError, 0.02, EIO),
          often("read", StorageFaultKind::kError, 0.02, EIO),
          often("read", StorageFaultKind::kError, 0.05, EINTR),
          often("read", StorageFaultKind::kFlip, 0.02),
          often("write", StorageFaultKind::kDelay, 0.05, 0, 500),
          often("read", StorageFaultKind::kDelay, 0.05, 0, 500)};
}

// A payload with memory of its own, and what is under way of it.
class Slot {
 public:
  Slot() : source_(allocate_blocks(kSlotBytes)), target_(allocate_blocks(kSlotBytes)) {}

  // False once the store is closed.
  bool step(DiskStore& store, std::minstd_rand& random) {
    if (ticket_ != nullptr) {
      end();
      return true;
    }
    try {
      if (payload_ == nullptr) {
        write(store, random);
      } else if (random() % 4 == 0) {
        payload_.reset();
      } else {
        std::memset(target(), 0, size_bytes_);
        is_read_ = true;
        ticket_ = store.read(payload_, target());
      }
    } catch (const StateError&) {
      return false;
    }
    return true;
  }

  void end() {
    if (ticket_ == nullptr) return;
    const std::shared_ptr<Ticket> ticket = std::move(ticket_);
    try {
      ticket->wait();
    } catch (const StorageError& error) {
      require(error.native_error() == EIO, error.what());
      ++g_failed;
      if (!is_read_) payload_.reset();
      return;
    } catch (const StateError&) {  // Closed before the engine had all of it.
      if (!is_read_) payload_.reset();
      return;
    }
    ++(is_read_ ? g_read : g_written);
    require(!is_read_ || std::memcmp(source(), target(), size_bytes_) == 0,
            "what was read is not what was written");
  }

  std::byte* memory() const { return source_.get(); }

 private:
  std::byte* source() const { return source_.get() + shift_; }
  std::byte* target() const { return target_.get() + shift_; }

  void write(DiskStore& store, std::minstd_rand& random) {
    size_bytes_ = kSizes[random() % kSizes.size()];
    shift_ = random() % 2 == 0 ? 0 : random() % 4096;
    std::byte* const data = source();
    uint64_t value = random();
    for (size_t i = 0; i < size_bytes_; ++i, value = value * 6364136223846793005ULL + 1) {
      data[i] = static_cast<std::byte>(value >> 56U);
    }
    is_read_ = false;
    WriteRequest request = store.write(data, size_bytes_);
    payload_ = std::move(request.payload);
    ticket_ = std::move(request.ticket);
  }

  BlockMemory source_;
  BlockMemory target_;
  size_t shift_ = 0;
  size_t size_bytes_ = 0;
  std::shared_ptr<DiskPayload> payload_;
  std::shared_ptr<Ticket> ticket_;
  bool is_read_ = false;
};

void work(DiskStore& store, size_t steps, unsigned seed) {
  std::minstd_rand random(seed);
  std::array<Slot, kSlots> slots;
  bool is_open = true;
  for (size_t i = 0; i < steps && is_open; ++i) {
    Slot& slot = slots[random() % kSlots];
    if (random() % 16 == 0) {
      slot.end();
      try {
        store.register_memory(slot.memory(), kSlotBytes);
      } catch (const ConfigError&) {  // It is registered.
        store.unregister_memory(slot.memory());
      } catch (const StateError&) {
      }
    }
    is_open = slot.step(store, random);
  }
  for (Slot& slot : slots) {
    slot.end();
    store.unregister_memory(slot.memory());
  }
}

void run(const std::string& folder, DiskEngineKind engine, size_t steps, unsigned seed) {
  DiskStoreOptions options;
  options.folders = {folder + "/a", folder + "/b"};
  options.engine = engine;
  options.extent_bytes_max = size_t{2} << 20;
  options.queue_length_max = 4;
  DiskStore store(options);
  std::atomic<size_t> working{kThreads};
  std::vector<std::thread> threads;
  for (size_t i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      // The last of them goes on until the store is closed.
      work(store, i == 0 ? SIZE_MAX : steps, seed * 100 + static_cast<unsigned>(i));
      --working;
    });
  }
  while (working > 1) {
    const DiskStats stats = store.stats();
    require(stats.read_bytes == 0 || stats.written_bytes > 0, "bytes were read and none written");
    std::this_thread::yield();
  }
  store.close();
  for (std::thread& thread : threads) thread.join();
  const DiskStats stats = store.stats();
  require(stats.pending_extents == 0, "extents are under way in a store that is closed");
  require(stats.used_bytes == 0, "space is in use without a payload");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const auto rounds = static_cast<unsigned>(std::atoi(argv[1]));
  const auto steps = static_cast<size_t>(std::atoi(argv[2]));
  const auto seed = static_cast<unsigned>(std::atoi(argv[3]));
  std::string folder = std::filesystem::temp_directory_path() / "spillover-stress-XXXXXX";
  require(mkdtemp(folder.data()) != nullptr, "there is no folder to work in");
  StorageFaults::instance().begin(plan(), seed);
  std::string engines = "threads";
  for (unsigned round = 0; round < rounds; ++round) {
    run(folder, DiskEngineKind::kThreads, steps, seed + round);
    try {
      run(folder, DiskEngineKind::kIoUring, steps, seed + round);
      engines = "threads and io_uring";
    } catch (const StorageError& error) {
      std::printf("(%s) ", error.what());
    }
  }
  std::filesystem::remove_all(folder);
  std::printf("%s: %ld payloads written, %ld read, %ld requests failed as planned\n",
              engines.c_str(), g_written.load(), g_read.load(), g_failed.load());
  return g_written > 0 && g_read > 0 && g_failed > 0 ? 0 : 1;
}
