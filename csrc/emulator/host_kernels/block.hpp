// Runs the threads of a CUDA block on one thread of the host.
//
// Note [Fibers where a kernel waits]: one fiber runs a block's threads one after the other, a plain
// loop. A thread that comes to a barrier keeps its fiber and the loop goes on in another one; so
// kernels that never wait cost one fiber, and nobody has to say which do.
//
// A barrier that not all live threads reach would hang a GPU; here it is reported, and the process
// ends.
//
// Made and used by the one thread that runs the launch; shared memory is thread_local, so that two
// launches on two threads do not meet.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <vector>

namespace spillover::host_kernels {

inline constexpr unsigned kWarpThreads = 32;

class Block {
 public:
  // thread_begins(index) is called whenever a thread starts or goes on; body runs one thread.
  Block(unsigned thread_count, std::function<void(unsigned)> thread_begins,
        std::function<void()> body)
      : thread_count_(thread_count),
        thread_begins_(std::move(thread_begins)),
        body_(std::move(body)),
        warps_((thread_count + kWarpThreads - 1) / kWarpThreads) {}
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  // The block that the calling kernel's thread belongs to.
  static Block& current() { return *active(); }

  // Runs one block to its end.
  void run() {
    active() = this;
    next_thread_ = finished_ = 0;
    for (std::size_t i = 0; i < warps_.size(); ++i) {
      const unsigned lanes = thread_count_ - static_cast<unsigned>(i) * kWarpThreads;
      warps_[i].live = lanes >= kWarpThreads ? ~0U : (1U << lanes) - 1;
    }
    while (finished_ < thread_count_) resume(*choose());
    active() = nullptr;
  }

  // Waits for all live threads of the block. Returns how many gave a true predicate.
  unsigned wait_for_block(bool predicate) {
    block_barrier_.count += predicate ? 1 : 0;
    arrive(block_barrier_, thread_count_ - finished_);
    return block_barrier_.result;
  }

  // Waits for the live lanes of this thread's warp that are in the mask.
  void wait_for_warp(unsigned mask) {
    Warp& warp = this_warp();
    arrive(warp.barriers[mask], popcount(mask & warp.live));
  }

  // What another lane gave in the same call; its own value where that lane takes no part.
  template <typename Value>
  Value exchange(unsigned mask, Value value, unsigned source_lane) {
    static_assert(sizeof(Value) <= sizeof(Slot) && std::is_trivially_copyable_v<Value>);
    Warp& warp = this_warp();
    std::memcpy(&warp.slots[lane()], &value, sizeof value);
    wait_for_warp(mask);
    if ((mask & warp.live) >> source_lane & 1U) {
      std::memcpy(&value, &warp.slots[source_lane], sizeof value);
    }
    wait_for_warp(mask);
    return value;
  }

  // The lanes of the mask whose predicate is true.
  unsigned ballot(unsigned mask, bool predicate) {
    Warp& warp = this_warp();
    const Slot mine = predicate ? 1 : 0;
    std::memcpy(&warp.slots[lane()], &mine, sizeof mine);
    wait_for_warp(mask);
    unsigned lanes = 0;
    for (unsigned i = 0; i < kWarpThreads; ++i) {
      if (((mask & warp.live) >> i & 1U) != 0 && warp.slots[i] != 0) lanes |= 1U << i;
    }
    wait_for_warp(mask);
    return lanes;
  }

  unsigned lane() const { return running_->thread % kWarpThreads; }
  unsigned live_lanes() { return this_warp().live; }

 private:
  using Slot = unsigned long long;

  struct Fiber {
    static constexpr std::size_t kStackBytes = std::size_t{256} << 10;

    Fiber()
        : stack(mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
                     0)) {
      if (stack == MAP_FAILED) throw std::bad_alloc();
    }
    ~Fiber() { munmap(stack, kStackBytes); }
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;

    ucontext_t context{};
    void* stack;
    unsigned thread = 0;
  };

  struct Barrier {
    std::vector<Fiber*> waiting;
    unsigned count = 0;
    unsigned result = 0;
  };

  struct Warp {
    unsigned live = 0;  // lanes whose thread has not ended
    Slot slots[kWarpThreads] = {};
    std::map<unsigned, Barrier> barriers;  // by mask
  };

  static Block*& active() {
    static thread_local Block* block = nullptr;
    return block;
  }

  static unsigned popcount(unsigned mask) { return static_cast<unsigned>(std::popcount(mask)); }

  Warp& this_warp() { return warps_[running_->thread / kWarpThreads]; }

  // The fiber to go on with: one for threads that have not started, else one whose barrier opened.
  Fiber* choose() {
    if (next_thread_ < thread_count_) {
      if (idle_.empty()) {
        add_fiber();
      }
      Fiber* const fiber = idle_.back();
      idle_.pop_back();
      return fiber;
    }
    if (ready_.empty()) {
      std::fprintf(stderr,
                   "spillover emulator: a kernel hangs: of %u threads in a block %u ended and the "
                   "others wait at barriers that not all of them reach\n",
                   thread_count_, finished_);
      std::abort();
    }
    Fiber* const fiber = ready_.front();
    ready_.pop_front();
    return fiber;
  }

  void add_fiber() {
    Fiber* const fiber = fibers_.emplace_back(std::make_unique<Fiber>()).get();
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack;
    fiber->context.uc_stack.ss_size = Fiber::kStackBytes;
    makecontext(&fiber->context, [] { active()->run_threads(); }, 0);
    idle_.push_back(fiber);
  }

  void resume(Fiber& fiber) {
    running_ = &fiber;
    swapcontext(&scheduler_, &fiber.context);
  }

  void park(Fiber& fiber) {
    swapcontext(&fiber.context, &scheduler_);
    // Whoever resumed it has set running_.
  }

  // A fiber's whole life; it is dropped with its block while it is parked here.
  void run_threads() {
    for (;;) {
      while (next_thread_ < thread_count_) {
        Fiber& self = *running_;
        self.thread = next_thread_++;
        thread_begins_(self.thread);
        body_();
        finish();
      }
      idle_.push_back(running_);
      park(*running_);
    }
  }

  void finish() {
    ++finished_;
    Warp& warp = this_warp();
    warp.live &= ~(1U << lane());
    open_if_complete(block_barrier_, thread_count_ - finished_);
    for (auto& [mask, barrier] : warp.barriers) {
      open_if_complete(barrier, popcount(mask & warp.live));
    }
  }

  void arrive(Barrier& barrier, unsigned expected) {
    Fiber& self = *running_;
    barrier.waiting.push_back(&self);
    if (barrier.waiting.size() == expected) {
      barrier.waiting.pop_back();  // the last one goes on at once
      open(barrier);
      return;
    }
    park(self);
    thread_begins_(self.thread);
  }

  void open_if_complete(Barrier& barrier, unsigned expected) {
    if (!barrier.waiting.empty() && barrier.waiting.size() == expected) open(barrier);
  }

  void open(Barrier& barrier) {
    barrier.result = barrier.count;
    barrier.count = 0;
    ready_.insert(ready_.end(), barrier.waiting.begin(), barrier.waiting.end());
    barrier.waiting.clear();
  }

  const unsigned thread_count_;
  const std::function<void(unsigned)> thread_begins_;
  const std::function<void()> body_;
  ucontext_t scheduler_{};
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> idle_;  // without a thread
  std::deque<Fiber*> ready_;  // whose barrier has opened
  Fiber* running_ = nullptr;
  unsigned next_thread_ = 0;
  unsigned finished_ = 0;
  Barrier block_barrier_;
  std::vector<Warp> warps_;
};

}  // namespace spillover::host_kernels
