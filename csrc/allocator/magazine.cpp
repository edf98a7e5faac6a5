#include "allocator/magazine.hpp"

#include <bit>
#include <mutex>
#include <thread>
#include <utility>

#include "allocator/expect.hpp"
#include "allocator/pool.hpp"
#include "base/error.hpp"
#include "driver/fork_guard.hpp"

namespace spillover {

thread_local constinit ThreadCache* t_thread_cache = nullptr;

namespace {

// Ends the thread's cache with the thread.
struct CacheOwner {
  std::unique_ptr<ThreadCache> cache;
  bool is_over = false;

  ~CacheOwner() {
    is_over = true;
    t_thread_cache = nullptr;
    // The blocks are the parent's, and its locks may be held for ever.
    if (in_forked_child()) static_cast<void>(cache.release());
  }
};

CacheOwner& cache_owner() {
  thread_local CacheOwner owner;
  return owner;
}

}  // namespace

void SpinLock::wait() const noexcept {
  // Who holds it works for a microsecond, unless it was descheduled.
  for (int i = 0; i < 100; ++i) {
    if (!is_locked_.load(std::memory_order_relaxed)) return;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  std::this_thread::yield();
}

void Magazine::append(Block*& head, std::vector<Block*>& blocks) {
  for (Block* block = head; block != nullptr; block = block->next_cached) blocks.push_back(block);
  head = nullptr;
}

void Magazine::empty_large(std::vector<Block*>& blocks) {
  if (large_bytes_ == 0) return;
  for (Block*& head : large_) append(head, blocks);
  large_bytes_ = 0;
}

void Magazine::empty(std::vector<Block*>& blocks) {
  empty_large(blocks);
  if (small_bytes_ == 0) return;
  for (size_t word = 0; word < small_in_use_.size(); ++word) {
    for (uint64_t bits = small_in_use_[word]; bits != 0; bits &= bits - 1) {
      append(small_[word * 64 + static_cast<size_t>(std::countr_zero(bits))], blocks);
    }
    small_in_use_[word] = 0;
  }
  small_bytes_ = 0;
}

size_t Magazine::check_invariants(const StreamState& stream) const {
  size_t count = 0;
  const auto add_list = [&](const Block* head, auto is_of_list) {
    size_t list_bytes = 0;
    for (const Block* block = head; block != nullptr; block = block->next_cached) {
      expect(block->state == BlockState::kCached, "a block in a magazine is not cached");
      expect(block->heap->stream == &stream, "a block is in the magazine of another stream");
      expect(is_of_list(block->size_bytes), "a block is in a magazine's list of another size");
      list_bytes += block->size_bytes;
      ++count;
      // A list that leads back into itself would not end.
      expect(list_bytes <= small_bytes_ + large_bytes_, "a magazine has more than it counts");
    }
    return list_bytes;
  };
  size_t small_bytes = 0;
  for (size_t bin = 0; bin < kSmallBins; ++bin) {
    if (small_[bin] == nullptr) continue;
    expect((small_in_use_[bin / 64] >> (bin % 64) & 1U) != 0, "a magazine forgets a list");
    small_bytes += add_list(small_[bin], [&](size_t size) {
      return size <= kSmallRequestMax && size / kBlockAlignment == bin;
    });
  }
  size_t large_bytes = 0;
  for (size_t bin = 0; bin < kLargeBins; ++bin) {
    large_bytes += add_list(large_[bin], [&](size_t size) {
      return size > kSmallRequestMax && large_bin(size) == bin;
    });
  }
  expect(small_bytes == small_bytes_ && large_bytes == large_bytes_,
         "the bytes of a magazine do not add up");
  expect(small_bytes <= kSmallBytesMax && large_bytes <= large_bytes_max_,
         "a magazine holds more than it may");
  return count;
}

ThreadCache* ThreadCache::create() {
  if (t_thread_cache != nullptr) return t_thread_cache;
  CacheOwner& owner = cache_owner();
  if (owner.is_over) return nullptr;
  owner.cache = std::make_unique<ThreadCache>();
  t_thread_cache = owner.cache.get();
  return t_thread_cache;
}

ArenaId ThreadCache::set_current_arena(ArenaId arena) {
  ThreadCache* cache = create();
  if (cache == nullptr) throw StateError("the calling thread is ending; it can have no tag");
  return std::exchange(cache->arena_, arena);
}

ThreadCache::~ThreadCache() {
  for (const auto& slot : slots_) slot->pool->retire(*this, *slot);
}

ThreadCounters* ThreadCache::counters_of(const Pool* pool) noexcept {
  for (const auto& slot : slots_) {
    if (slot->pool == pool) return slot->counters;
  }
  return nullptr;
}

MagazineSlot* ThreadCache::add(std::unique_ptr<MagazineSlot> slot) {
  slots_.push_back(std::move(slot));
  return slots_.back().get();
}

}  // namespace spillover
