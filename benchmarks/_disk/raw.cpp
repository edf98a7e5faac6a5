// Plain O_DIRECT loops over one file, without checksums or any other care: what a disk gives at
// best. Compiled by benchmarks/_disk/raw.py.
//
// Each line of the input, "write|read threads|io_uring|io_uring_sums DEPTH BLOCK_BYTES BYTES
// DESCRIPTOR", moves the first BYTES of a file that the parent has opened, and is answered by the
// seconds that it took. io_uring_sums has its one thread compute our checksum of each block, before
// it is written and after it was read: what reading all memory once more costs, at best.
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/crc32c.hpp"
#include "tiers/io_uring.hpp"

namespace {

using spillover::IoUring;
using spillover::TransferDirection;

[[noreturn]] void fail(const std::string& what) {
  std::cerr << what << ": " << std::strerror(errno) << '\n';
  std::_Exit(1);
}

struct Job {
  bool is_write;
  bool has_sums;
  uint64_t depth;
  uint64_t block_bytes;
  uint64_t total_bytes;
};

// As much memory as a program's data has, so that it comes from memory and not from a cache. Blocks
// take turns in it, by their offsets.
class Memory {
 public:
  static constexpr uint64_t kBytes = 256 << 20;

  Memory() {
    // As benchmarks/_disk/memory.py makes ours: huge pages, where the system has them on demand. A
    // virtual disk may be twice as fast with them, since it is handed fewer pieces.
    void* const found =
        mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED) fail("memory");
    madvise(found, kBytes, MADV_HUGEPAGE);
    data_ = static_cast<std::byte*>(found);
    // Random, as ours: some disks pack what repeats.
    std::mt19937_64 numbers(1);
    for (uint64_t i = 0; i < kBytes; i += 8) {
      const uint64_t value = numbers();
      std::memcpy(data_ + i, &value, sizeof value);
    }
  }
  ~Memory() { munmap(data_, kBytes); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  std::byte* at(uint64_t offset) const { return data_ + offset % kBytes; }

 private:
  std::byte* data_ = nullptr;
};

void check_moved(const Job& job, int64_t moved_bytes) {
  if (moved_bytes != static_cast<int64_t>(job.block_bytes)) fail("a transfer failed");
}

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

double run_threads(int file, const Job& job, const Memory& memory) {
  const auto begin = Clock::now();
  std::atomic<uint64_t> next{0};
  std::vector<std::thread> threads;
  for (uint64_t i = 0; i < job.depth; ++i) {
    threads.emplace_back([&] {
      for (uint64_t at = next++ * job.block_bytes; at < job.total_bytes;
           at = next++ * job.block_bytes) {
        std::byte* const block = memory.at(at);
        const auto position = static_cast<off_t>(at);
        check_moved(job, job.is_write ? pwrite(file, block, job.block_bytes, position)
                                      : pread(file, block, job.block_bytes, position));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return seconds_since(begin);
}

// Without the time of making the ring.
double run_io_uring(int file, const Job& job, const Memory& memory) {
  IoUring ring(static_cast<uint32_t>(job.depth));
  ring.register_file(file);
  const iovec buffer{memory.at(0), Memory::kBytes};
  const bool is_registered = ring.register_buffers({&buffer, 1}) == 0;
  uint64_t next = 0;
  uint64_t running = 0;
  uint32_t sums = 0;  // Of no use, but that they are computed.
  std::vector<uint64_t> offsets(job.depth);
  const auto add_sum = [&](uint64_t offset) {
    if (job.has_sums) sums ^= spillover::crc32c(memory.at(offset), job.block_bytes);
  };
  const auto start = [&](uint64_t slot) {
    if (next >= job.total_bytes) return;
    offsets[slot] = next;
    if (job.is_write) add_sum(next);
    ring.add_transfer(
        {job.is_write ? TransferDirection::kWrite : TransferDirection::kRead, file, memory.at(next),
         static_cast<uint32_t>(job.block_bytes), next, is_registered ? 0 : -1},
        slot);
    next += job.block_bytes;
    ++running;
  };
  const auto begin = Clock::now();
  for (uint64_t i = 0; i < job.depth; ++i) start(i);
  while (running > 0) {
    if (ring.submit(IoUring::Wait::kForOne) != 0) fail("io_uring_enter");
    while (const auto result = ring.next_result()) {
      check_moved(job, result->value);
      --running;
      const uint64_t done = offsets[result->tag];
      start(result->tag);
      if (!job.is_write) add_sum(done);
    }
  }
  const double seconds = seconds_since(begin);
  if (job.has_sums && sums == 1) std::cerr << ' ';
  return seconds;
}

}  // namespace

int main() {
  std::string direction;
  std::string way;
  int file = -1;
  Job job{};
  const Memory memory;
  while (std::cin >> direction >> way >> job.depth >> job.block_bytes >> job.total_bytes >> file) {
    job.is_write = direction == "write";
    job.has_sums = way == "io_uring_sums";
    std::cout << (way == "threads" ? run_threads : run_io_uring)(file, job, memory) << std::endl;
  }
  return 0;
}
