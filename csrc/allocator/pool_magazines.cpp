// The pool's side of magazines: what takes no mutex, and how kept blocks and counts come back.
#include <algorithm>
#include <mutex>

#include "allocator/page_table.hpp"
#include "allocator/pool.hpp"
#include "allocator/size_rounding.hpp"
#include "allocator/statistics.hpp"
#include "base/check.hpp"
#include "driver/stream.hpp"

namespace spillover {
namespace {

// The share of the device's memory that one magazine may keep in large blocks while the pool serves
// one stream.
constexpr size_t kLargeShare = 64;

// The counters that follow one metric of ThreadCounters.
template <class Action>
void for_each_family(spillover_stats_t& statistics, Action action) {
  action(ThreadCounters::kCount, statistics.allocation);
  action(ThreadCounters::kCount, statistics.active);
  action(ThreadCounters::kBytes, statistics.allocated_bytes);
  action(ThreadCounters::kBytes, statistics.active_bytes);
  action(ThreadCounters::kRequestedBytes, statistics.requested_bytes);
}

}  // namespace

void* Pool::allocate_cached(size_t size_bytes, StreamHandle stream) noexcept {
  ThreadCache* cache = ThreadCache::current();
  if (cache == nullptr || size_bytes == 0 || size_bytes > device_bytes_) return nullptr;
  const size_t rounded_bytes = SizeRounding::round(size_bytes);
  const std::lock_guard lock(cache->lock);
  MagazineSlot* slot = cache->find(this, normalize_stream(stream));
  if (slot == nullptr) return nullptr;
  Block* block = slot->magazine.take(rounded_bytes);
  if (block == nullptr) return nullptr;
  block->requested_bytes = size_bytes;
  block->state.store(BlockState::kLive, std::memory_order_relaxed);
  slot->counters->add(block->heap->size_class, rounded_bytes, size_bytes);
  return reinterpret_cast<void*>(block->address);
}

bool Pool::free_to_magazine(void* pointer) noexcept {
  const auto address = reinterpret_cast<DeviceAddress>(pointer);
  Block* block = PageTable::instance().find(address);
  return block != nullptr && block->address == address && block->state == BlockState::kLive &&
         free_cached(block);
}

bool Pool::free_cached(Block* block) noexcept {
  ThreadCache* cache = ThreadCache::current();
  if (cache == nullptr || !block->uses.empty() || block->is_shared) return false;
  const std::lock_guard lock(cache->lock);
  MagazineSlot* slot = cache->find(block->heap->stream);
  if (slot == nullptr || !slot->magazine.put(block)) return false;
  block->state.store(BlockState::kCached, std::memory_order_relaxed);
  slot->counters->subtract(block->heap->size_class, block->size_bytes, block->requested_bytes);
  return true;
}

// The calling thread's magazine for the stream, made where the stream may have one; null otherwise.
MagazineSlot* Pool::equip(StreamState& stream) {
  if (!stream.is_immortal || is_private_arena(stream.arena) || !settings_.has_thread_cache)
    return nullptr;
  ThreadCache* cache = ThreadCache::create();
  if (cache == nullptr) return nullptr;
  if (MagazineSlot* slot = cache->find(&stream)) return slot;
  ThreadCounters* counters = cache->counters_of(this);
  if (counters == nullptr) {
    counters = counters_.emplace_back(std::make_unique<ThreadCounters>()).get();
  }
  const size_t large_bytes_max =
      serves_several_streams_ ? watermark_bytes() : device_bytes_ / kLargeShare;
  auto made = std::make_unique<MagazineSlot>(this, &stream, counters, large_bytes_max);
  const std::lock_guard lock(cache->lock);
  made->magazine.set_closed(stream.is_asleep);
  MagazineSlot* slot = cache->add(std::move(made));
  magazines_.push_back({cache, slot});
  return slot;
}

// The blocks were counted as freed when they went into the magazine.
void Pool::return_cached(const std::vector<Block*>& blocks) {
  for (Block* block : blocks) {
    SPILLOVER_CHECK(block->state == BlockState::kCached, "a magazine holds a block in use");
    block->freed_at = ++block->heap->stream->freed_count;
    note_freed(*block->heap, {block->address, block->end()});
    merge_free(block);
  }
}

// Of every thread: a block that is freed by another thread than it was allocated by, as activations
// are in backward, is a part of the stream's free memory no less than the caller's own.
void Pool::empty_large(const StreamState& stream) {
  std::vector<Block*> blocks;
  for (const MagazineReference& reference : magazines_) {
    if (reference.slot->stream != &stream) continue;
    const std::lock_guard lock(reference.cache->lock);
    reference.slot->magazine.empty_large(blocks);
  }
  return_cached(blocks);
}

void Pool::empty(ThreadCache& cache, MagazineSlot& slot) {
  std::vector<Block*> blocks;
  {
    const std::lock_guard lock(cache.lock);
    slot.magazine.empty(blocks);
  }
  return_cached(blocks);
}

// Gives the bytes of the blocks that came back.
size_t Pool::empty_magazines() {
  std::vector<Block*> blocks;
  for (const MagazineReference& reference : magazines_) {
    const std::lock_guard lock(reference.cache->lock);
    reference.slot->magazine.empty(blocks);
  }
  size_t size_bytes = 0;
  for (const Block* block : blocks) size_bytes += block->size_bytes;
  return_cached(blocks);
  return size_bytes;
}

Pool::StillMagazines::StillMagazines(Pool& pool, Contents contents) {
  for (const MagazineReference& reference : pool.magazines_) caches_.push_back(reference.cache);
  // In the order of their addresses: the pool of another device may do the same at the same time.
  std::sort(caches_.begin(), caches_.end());
  caches_.erase(std::unique(caches_.begin(), caches_.end()), caches_.end());
  for (ThreadCache* cache : caches_) cache->lock.lock();
  if (contents == Contents::kLeft) return;
  std::vector<Block*> blocks;
  for (const MagazineReference& reference : pool.magazines_) {
    reference.slot->magazine.empty(blocks);
  }
  pool.return_cached(blocks);
}

Pool::StillMagazines::~StillMagazines() {
  for (ThreadCache* cache : caches_) cache->lock.unlock();
}

void Pool::retire(ThreadCache& cache, MagazineSlot& slot) {
  const std::lock_guard lock(mutex_);
  empty(cache, slot);
  take_over(*slot.counters);
  std::erase_if(magazines_,
                [&](const MagazineReference& reference) { return reference.slot == &slot; });
  const bool is_counted_elsewhere =
      std::any_of(magazines_.begin(), magazines_.end(), [&](const MagazineReference& reference) {
        return reference.slot->counters == slot.counters;
      });
  if (is_counted_elsewhere) return;
  std::erase_if(counters_, [&](const auto& counters) { return counters.get() == slot.counters; });
}

// Takes over what the calling thread has counted.
void Pool::take_over_counters() {
  ThreadCache* cache = ThreadCache::current();
  if (cache == nullptr) return;
  if (ThreadCounters* counters = cache->counters_of(this)) take_over(*counters);
}

void Pool::take_over(ThreadCounters& counters) {
  for_each_family(statistics_, [&](size_t metric, ClassCounters& family) {
    for (size_t index = 0; index < ThreadCounters::kClassCount; ++index) {
      const ThreadCounters::Sum& sum = counters.sums[metric][index];
      spillover_counter& counter = family[index];
      const int64_t others = largest_of_others(&counters, metric, index);
      counter.peak = std::max(counter.peak, counter.current + sum.largest.get() + others);
      counter.current += sum.change.get();
      counter.allocated += sum.added.get();
      counter.freed += sum.added.get() - sum.change.get();
    }
  });
  for (auto& metric : counters.sums) {
    for (ThreadCounters::Sum& sum : metric) {
      sum.change.set(0);
      sum.largest.set(0);
      sum.added.set(0);
    }
  }
}

// How much the other threads may have had at once, beyond what the pool has taken over.
int64_t Pool::largest_of_others(const ThreadCounters* own, size_t metric, size_t index) const {
  int64_t sum = 0;
  for (const auto& counters : counters_) {
    if (counters.get() != own) sum += counters->sums[metric][index].largest.get();
  }
  return sum;
}

// After a change of the pool's own counters.
void Pool::raise_peaks() {
  for_each_family(statistics_, [&](size_t metric, ClassCounters& family) {
    for (size_t index = 0; index < ThreadCounters::kClassCount; ++index) {
      spillover_counter& counter = family[index];
      counter.peak =
          std::max(counter.peak, counter.current + largest_of_others(nullptr, metric, index));
    }
  });
}

// What the pool and all threads have counted.
spillover_stats_t Pool::totals() const {
  spillover_stats_t statistics = statistics_;
  for_each_family(statistics, [&](size_t metric, ClassCounters& family) {
    for (size_t index = 0; index < ThreadCounters::kClassCount; ++index) {
      spillover_counter& counter = family[index];
      counter.peak =
          std::max(counter.peak, counter.current + largest_of_others(nullptr, metric, index));
      for (const auto& counters : counters_) {
        const ThreadCounters::Sum& sum = counters->sums[metric][index];
        counter.current += sum.change.get();
        counter.allocated += sum.added.get();
        counter.freed += sum.added.get() - sum.change.get();
      }
    }
  });
  spillover_counter& allocated = statistics.allocated_bytes[SPILLOVER_CLASS_ALL];
  allocated.peak = std::max(allocated.peak, earlier_peak_);
  return statistics;
}

}  // namespace spillover
