#include "tiers/populate.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/bytes.hpp"
#include "base/error.hpp"
#include "tiers/host_mapping.hpp"

namespace spillover {
namespace {

constexpr size_t kStepBytes = 32 * kMiB;
constexpr size_t kThreadsMax = 8;
constexpr auto kProgressInterval = std::chrono::milliseconds(50);

// Missing in older headers.
constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE
constexpr int kCollapse = 25;       // MADV_COLLAPSE
constexpr int kRefusalsMax = 4;

// 0, or the errno of a system that has no more pages.
int populate_step(std::byte* address, size_t size_bytes) {
  if (madvise(address, size_bytes, kPopulateWrite) == 0) return 0;
  // Before Linux 5.14; EAGAIN and EINTR tell that a part is not done.
  if (errno != EINVAL && errno != EAGAIN && errno != EINTR) return errno;
  for (size_t offset = 0; offset < size_bytes; offset += host_page_bytes()) {
    *reinterpret_cast<volatile std::byte*>(address + offset) = std::byte{0};
  }
  return 0;
}

class Work {
 public:
  Work(std::byte* address, size_t size_bytes, PageSize page_size)
      : address_(address),
        size_bytes_(size_bytes),
        may_collapse_(page_size == PageSize::kHugeWhereItCan) {
    const size_t step_count = (size_bytes + kStepBytes - 1) / kStepBytes;
    const size_t cores = std::max(1U, std::thread::hardware_concurrency());
    thread_count_ = std::min({step_count, cores, kThreadsMax});
    running_ = thread_count_;
    try {
      for (size_t i = 0; i < thread_count_; ++i) threads_.emplace_back([this] { run(); });
    } catch (...) {
      const std::lock_guard lock(mutex_);
      running_ -= thread_count_ - threads_.size();  // Those that there are do it.
      if (threads_.empty()) throw;
    }
  }
  ~Work() {
    is_stopped_ = true;
    for (std::thread& thread : threads_) thread.join();
  }
  Work(const Work&) = delete;
  Work& operator=(const Work&) = delete;

  void wait(const std::function<void(size_t)>& progress) {
    std::unique_lock lock(mutex_);
    while (!changed_.wait_for(lock, kProgressInterval, [&] { return running_ == 0; })) {
      if (!progress) continue;
      lock.unlock();
      progress(done_bytes_);
      lock.lock();
    }
    if (error_ == 0) return;
    throw HostOutOfMemoryError("the system has no pages for " + format_bytes(size_bytes_) +
                                   " of host memory: " + std::strerror(error_),
                               size_bytes_);
  }

  size_t huge_bytes() const { return huge_bytes_; }

 private:
  void run() noexcept {
    int error = 0;
    while (error == 0 && !is_stopped_) {
      const size_t offset = next_.fetch_add(kStepBytes);
      if (offset >= size_bytes_) break;
      const size_t step_bytes = std::min(kStepBytes, size_bytes_ - offset);
      if (may_collapse_) collapse(address_ + offset, step_bytes);
      error = populate_step(address_ + offset, step_bytes);
      if (error == 0) done_bytes_ += step_bytes;
    }
    if (error != 0) is_stopped_ = true;
    const std::lock_guard lock(mutex_);
    if (error != 0) error_ = error;
    if (--running_ == 0) changed_.notify_all();
  }

  void collapse(std::byte* address, size_t step_bytes) noexcept {
    for (size_t offset = 0; offset + kHugePageBytes <= step_bytes; offset += kHugePageBytes) {
      if (is_stopped_) return;
      // The kernel wants one page to be there already.
      madvise(address + offset, host_page_bytes(), kPopulateWrite);
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
  size_t thread_count_ = 0;
  std::atomic<size_t> next_{0};
  std::atomic<size_t> done_bytes_{0};
  std::atomic<size_t> huge_bytes_{0};
  std::atomic<int> refusals_{0};
  std::atomic<bool> may_collapse_;
  std::atomic<bool> is_stopped_{false};
  std::mutex mutex_;
  std::condition_variable changed_;
  // Guarded by mutex_.
  size_t running_ = 0;
  int error_ = 0;
  std::vector<std::thread> threads_;
};

}  // namespace

size_t populate(std::byte* address, size_t size_bytes, PageSize page_size,
                const std::function<void(size_t)>& progress) {
  Work work(address, size_bytes, page_size);
  work.wait(progress);
  return work.huge_bytes();
}

}  // namespace spillover
