#include "tiers/populate.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "base/bytes.hpp"
#include "base/error.hpp"

namespace spillover {
namespace {

constexpr size_t kStepBytes = 32 * kMiB;
constexpr size_t kThreadsMax = 8;
constexpr auto kProgressInterval = std::chrono::milliseconds(50);

// Claimed at most before what is left is read again.
constexpr size_t kAllowanceBytesMax = 256 * kMiB;

// Missing in older headers.
constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE
constexpr int kCollapse = 25;       // MADV_COLLAPSE
constexpr int kRefusalsMax = 4;
constexpr int kAttemptsMax = 4;

size_t page_bytes() {
  static const auto bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

// 0, or the errno of a system that has no more pages.
int populate_step(std::byte* address, size_t size_bytes) {
  for (int attempt = 0; attempt < kAttemptsMax; ++attempt) {
    if (madvise(address, size_bytes, kPopulateWrite) == 0) return 0;
    if (errno != EAGAIN && errno != EINTR) break;
  }
  if (errno != EINVAL) return errno;
  for (size_t offset = 0; offset < size_bytes; offset += page_bytes()) {  // Before Linux 5.14.
    *reinterpret_cast<volatile std::byte*>(address + offset) = std::byte{0};
  }
  return 0;
}

class Work {
 public:
  Work(std::byte* address, size_t size_bytes, const PopulateOptions& options)
      : address_(address),
        size_bytes_(size_bytes),
        options_(options),
        may_collapse_(options.page_size == PageSize::kHugeWhereItCan) {}
  ~Work() {
    {
      const std::lock_guard lock(mutex_);
      is_stopped_ = true;
    }
    changed_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  Work(const Work&) = delete;
  Work& operator=(const Work&) = delete;

  void run() {
    if (options_.progress) options_.progress(0);
    const size_t step_count = (size_bytes_ + kStepBytes - 1) / kStepBytes;
    const size_t cores = std::max(1U, std::thread::hardware_concurrency());
    const size_t thread_count = std::min({step_count, cores, kThreadsMax});
    if (thread_count > 1 || options_.progress) start(thread_count);
    if (threads_.empty()) {
      running_ = 1;
      take_steps();
    }
    wait();
    if (failure_) std::rethrow_exception(failure_);
  }

  size_t huge_bytes() const { return huge_bytes_; }

 private:
  void start(size_t thread_count) {
    threads_.reserve(thread_count);
    running_ = thread_count;
    try {
      while (threads_.size() < thread_count) threads_.emplace_back([this] { take_steps(); });
    } catch (const std::system_error&) {
      // The system gives no more threads: those that there are do it, or this one.
      const std::lock_guard lock(mutex_);
      running_ -= thread_count - threads_.size();
    }
  }

  void wait() {
    std::unique_lock lock(mutex_);
    const auto is_over = [&] { return running_ == 0; };
    while (!changed_.wait_for(lock, kProgressInterval, is_over)) {
      if (!options_.progress) continue;
      const size_t done_bytes = done_bytes_;
      lock.unlock();
      options_.progress(done_bytes);
      lock.lock();
    }
  }

  void take_steps() noexcept {
    std::unique_lock lock(mutex_);
    try {
      size_t offset = 0;
      size_t step_bytes = 0;
      while (claim(lock, offset, step_bytes)) {
        lock.unlock();
        if (may_collapse_) collapse(address_ + offset, step_bytes);
        const int error = populate_step(address_ + offset, step_bytes);
        lock.lock();
        in_flight_bytes_ -= step_bytes;
        if (error != 0) throw_refused(error);
        done_bytes_ += step_bytes;
        changed_.notify_all();
      }
    } catch (...) {
      if (!failure_) failure_ = std::current_exception();
      is_stopped_ = true;
    }
    --running_;
    changed_.notify_all();
  }

  // The next step, where there is one and something left for it. Called, and left, with the lock.
  bool claim(std::unique_lock<std::mutex>& lock, size_t& offset, size_t& step_bytes) {
    for (;;) {
      step_bytes = std::min(kStepBytes, size_bytes_ - next_);
      if (is_stopped_ || step_bytes == 0) return false;
      if (!options_.available || allowance_bytes_ >= step_bytes) break;
      const HostMemoryLimit left = options_.available();
      const size_t free_bytes = left.bytes - std::min(left.bytes, options_.floor_bytes);
      if (free_bytes >= in_flight_bytes_ + step_bytes) {
        const size_t claimable_bytes = free_bytes - in_flight_bytes_;
        allowance_bytes_ = std::max(step_bytes, std::min(claimable_bytes / 2, kAllowanceBytesMax));
        break;
      }
      if (in_flight_bytes_ == 0) throw_too_little(left);
      changed_.wait(lock);
    }
    if (options_.available) allowance_bytes_ -= step_bytes;
    offset = next_;
    next_ += step_bytes;
    in_flight_bytes_ += step_bytes;
    return true;
  }

  [[noreturn]] void throw_refused(int error) const {
    throw HostOutOfMemoryError("the system has no pages for " + format_bytes(size_bytes_) +
                                   " of host memory: " + std::strerror(error),
                               size_bytes_);
  }

  [[noreturn]] void throw_too_little(const HostMemoryLimit& left) const {
    throw HostOutOfMemoryError(
        format_bytes(size_bytes_) + " of host memory cannot be had: with " +
            format_bytes(done_bytes_) + " of it made, " + left.source + " leaves this process " +
            format_bytes(left.bytes) + ", of which " + format_bytes(options_.floor_bytes) +
            " are left alone. Offload less, use the disk tier, or raise that limit",
        size_bytes_);
  }

  void collapse(std::byte* address, size_t step_bytes) noexcept {
    for (size_t offset = 0; offset + kHugePageBytes <= step_bytes; offset += kHugePageBytes) {
      // The kernel wants one page to be there already.
      madvise(address + offset, page_bytes(), kPopulateWrite);
      if (madvise(address + offset, kHugePageBytes, kCollapse) == 0) {
        huge_bytes_ += kHugePageBytes;
      } else if (errno == EINVAL || ++refusals_ >= kRefusalsMax) {
        may_collapse_ = false;
        return;
      }
    }
  }

  std::byte* const address_;
  const size_t size_bytes_;
  const PopulateOptions& options_;
  std::atomic<size_t> huge_bytes_{0};
  std::atomic<int> refusals_{0};
  std::atomic<bool> may_collapse_;

  std::mutex mutex_;
  std::condition_variable changed_;
  // Guarded by mutex_. Invariant: done + in flight = next, as long as nothing failed.
  size_t next_ = 0;
  size_t in_flight_bytes_ = 0;
  size_t done_bytes_ = 0;
  size_t allowance_bytes_ = 0;
  size_t running_ = 0;
  bool is_stopped_ = false;
  std::exception_ptr failure_;
  std::vector<std::thread> threads_;
};

}  // namespace

size_t populate(std::byte* address, size_t size_bytes, const PopulateOptions& options) {
  Work work(address, size_bytes, options);
  work.run();
  return work.huge_bytes();
}

}  // namespace spillover
