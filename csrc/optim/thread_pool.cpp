#include "optim/thread_pool.hpp"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <csignal>
#include <memory>
#include <mutex>

#include "base/error.hpp"

namespace spillover {
namespace {

struct alignas(64) Share {
  std::atomic<size_t> next{0};
  size_t end = 0;
};

// One call of run_chunks; lives on the caller's stack.
struct Job {
  void* context = nullptr;
  void (*body)(void*, size_t) = nullptr;
  std::unique_ptr<Share[]> shares;
  size_t share_count = 0;
  // Guarded by the pool's mutex.
  size_t helpers_wanted = 0;  // 0 once there is nothing left to take
  size_t helpers_active = 0;
  std::condition_variable done;
};

void work(Job& job, size_t own_share) {
  for (size_t i = 0; i < job.share_count; ++i) {
    Share& share = job.shares[(own_share + i) % job.share_count];
    for (;;) {
      const size_t chunk = share.next.fetch_add(1, std::memory_order_relaxed);
      if (chunk >= share.end) break;
      job.body(job.context, chunk);
    }
  }
}

// Leaked on purpose: its threads use it until the process ends.
class Pool {
 public:
  Pool() : nodes_(processors_by_node()) {}

  int processor_count() const {
    size_t count = 0;
    for (const auto& node : nodes_) count += node.size();
    return std::max(1, static_cast<int>(count));
  }

  void run(Job& job) {
    {
      const std::lock_guard lock(mutex_);
      start_threads(job.share_count - 1);
      job.helpers_wanted = job.share_count - 1;
      jobs_.push_back(&job);
    }
    if (job.share_count == 2) {
      wanted_.notify_one();
    } else {
      wanted_.notify_all();
    }
    work(job, 0);
    std::unique_lock lock(mutex_);
    jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));
    job.done.wait(lock, [&] { return job.helpers_active == 0; });
  }

 private:
  struct Start {
    Pool* pool;
    size_t number;
  };

  static void* thread_main(void* argument) {
    const std::unique_ptr<Start> start(static_cast<Start*>(argument));
    start->pool->help(start->number);
    return nullptr;
  }

  // Called with the mutex. Fewer threads than wanted do the work as well.
  void start_threads(size_t count) {
    while (thread_count_ < count) {
      auto start = std::make_unique<Start>(Start{this, thread_count_ + 1});
      sigset_t all;
      sigset_t before;
      sigfillset(&all);
      pthread_sigmask(SIG_SETMASK, &all, &before);
      pthread_t thread{};
      const int result = pthread_create(&thread, nullptr, thread_main, start.get());
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
      if (result != 0) return;
      bind(thread, start->number);
      (void)start.release();  // The thread's.
      pthread_setname_np(thread, "spillover-optim");
      pthread_detach(thread);
      ++thread_count_;
    }
  }

  // To the processors of one node, where there are several nodes.
  void bind(pthread_t thread, size_t number) const {
    if (nodes_.size() < 2) return;
    number %= static_cast<size_t>(processor_count());
    for (const auto& node : nodes_) {
      if (number >= node.size()) {
        number -= node.size();
        continue;
      }
      cpu_set_t processors;
      CPU_ZERO(&processors);
      for (const int processor : node) CPU_SET(static_cast<size_t>(processor), &processors);
      pthread_setaffinity_np(thread, sizeof processors, &processors);
      return;
    }
  }

  [[noreturn]] void help(size_t number) {
    std::unique_lock lock(mutex_);
    for (;;) {
      const auto found = std::find_if(jobs_.begin(), jobs_.end(),
                                      [](const Job* job) { return job->helpers_wanted != 0; });
      if (found == jobs_.end()) {
        wanted_.wait(lock);
        continue;
      }
      Job& job = **found;
      --job.helpers_wanted;
      ++job.helpers_active;
      lock.unlock();
      work(job, number);
      lock.lock();
      job.helpers_wanted = 0;
      if (--job.helpers_active == 0) job.done.notify_one();
    }
  }

  const std::vector<std::vector<int>> nodes_;
  std::mutex mutex_;
  std::condition_variable wanted_;
  // Guarded by mutex_.
  std::vector<Job*> jobs_;
  size_t thread_count_ = 0;
};

std::atomic<Pool*> g_pool{nullptr};
std::atomic<int> g_threads{0};

// A child of fork() has none of the threads, and the mutex may be held for ever.
void forget_pool() {
  g_pool.store(nullptr, std::memory_order_relaxed);
}

Pool& pool() {
  static const bool watches_forks = pthread_atfork(nullptr, nullptr, forget_pool) == 0;
  (void)watches_forks;
  Pool* found = g_pool.load(std::memory_order_acquire);
  if (found != nullptr) return *found;
  auto made = std::make_unique<Pool>();
  if (g_pool.compare_exchange_strong(found, made.get(), std::memory_order_acq_rel)) {
    return *made.release();
  }
  return *found;
}

constexpr size_t kTouchedBytes = size_t{1} << 20;

}  // namespace

void run_chunks(size_t chunk_count, int threads, void* context,
                void (*body)(void* context, size_t chunk)) {
  if (threads <= 0) threads = optimizer_threads();
  const size_t share_count = std::min(chunk_count, static_cast<size_t>(threads));
  if (share_count < 2) {
    for (size_t chunk = 0; chunk < chunk_count; ++chunk) body(context, chunk);
    return;
  }
  Job job;
  job.context = context;
  job.body = body;
  job.share_count = share_count;
  job.shares = std::make_unique<Share[]>(share_count);
  for (size_t i = 0; i < share_count; ++i) {
    job.shares[i].next.store(chunk_count * i / share_count, std::memory_order_relaxed);
    job.shares[i].end = chunk_count * (i + 1) / share_count;
  }
  pool().run(job);
}

void set_optimizer_threads(int threads) {
  if (threads < 0) {
    throw ConfigError("threads=" + std::to_string(threads) +
                      " is below 0; give a number of threads, or 0 for one a processor");
  }
  g_threads.store(threads, std::memory_order_relaxed);
}

int optimizer_threads() noexcept {
  const int threads = g_threads.load(std::memory_order_relaxed);
  return threads > 0 ? threads : pool().processor_count();
}

void touch_pages(void* address, size_t size_bytes, int threads) {
  static const auto page_bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  struct Range {
    char* begin;
    size_t size_bytes;
  } range{static_cast<char*>(address), size_bytes};
  run_chunks((size_bytes + kTouchedBytes - 1) / kTouchedBytes, threads, &range,
             [](void* context, size_t chunk) {
               const auto& all = *static_cast<Range*>(context);
               const size_t end = std::min(all.size_bytes, (chunk + 1) * kTouchedBytes);
               for (size_t at = chunk * kTouchedBytes; at < end; at += page_bytes)
                 all.begin[at] = 0;
             });
}

}  // namespace spillover
