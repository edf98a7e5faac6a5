// Freed blocks that a thread keeps for itself, so that most allocations take no lock.
//
// Note [Magazines]. Each thread has a magazine for each stream and arena that it uses. A
// freed block goes there as it is, and a request of exactly its size gets it back; neither the
// pool's mutex nor the heap's structures are touched. For the heap such a block is in use: it does
// not merge. So that this costs no memory
//   - a magazine holds at most kSmallBytesMax of small blocks and a share of the device of large
//   ones, less once several streams take memory (Note [Watermarks] in pool_watermarks.cpp);
//   - a large request that finds no block of its size returns every thread's large ones of its
//     stream to the heap before it looks there;
//   - before a heap grows every thread's magazines are emptied into the heaps.
// Only streams that never die have magazines: who reuses a block by a stream's handle must know
// that the handle still is that stream's (Note [Foreign streams]).
//   Every block of a magazine is cached, of its stream, in the list of its size, in no other list;
//   small_bytes and large_bytes are the sums of the lists, and at most their maxima.
//
// Two threads that free one block at the same instant are not told of it: each may see it live and
// put it into its own magazine. One after the other is an error, as any thread sees that the block
// is cached. To exclude the rest the state would have to be exchanged atomically, a second locked
// instruction a free: the one of the cache's lock is the thread's own and orders nothing between
// the two.
//
// A thread's cache has a lock of its own, which its thread takes for every operation and others
// only to empty it. Order of locks: a pool's mutex, then a cache's lock, and nothing under that.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "allocator/block.hpp"
#include "allocator/thread_counters.hpp"

namespace spillover {

class Pool;

class SpinLock {
 public:
  void lock() noexcept {
    while (is_locked_.exchange(true, std::memory_order_acquire)) wait();
  }
  void unlock() noexcept { is_locked_.store(false, std::memory_order_release); }

 private:
  void wait() const noexcept;

  std::atomic<bool> is_locked_{false};
};

// Blocks of one stream by size. Not thread-safe: guarded by its ThreadCache's lock.
class Magazine {
 public:
  static constexpr size_t kSmallBytesMax = 8 * kMiB;

  explicit Magazine(size_t large_bytes_max) : large_bytes_max_(large_bytes_max) {}

  // A block of exactly that size, the one that came last; null where there is none.
  Block* take(size_t size_bytes) noexcept;
  // False where the block would be too much.
  bool put(Block* block) noexcept;

  // What comes from now on is refused beyond that.
  void limit_large(size_t large_bytes_max) { large_bytes_max_ = large_bytes_max; }

  // While it is closed whatever comes is refused.
  void set_closed(bool is_closed) { is_closed_ = is_closed; }
  bool is_closed() const { return is_closed_; }

  // Appends the large blocks, or all of them, and keeps none.
  void empty_large(std::vector<Block*>& blocks);
  void empty(std::vector<Block*>& blocks);

  // Gives the number of blocks. Throws StateError that says which equation does not hold.
  size_t check_invariants(const StreamState& stream) const;

 private:
  static constexpr size_t kSmallBins = kSmallRequestMax / kBlockAlignment + 1;
  static constexpr size_t kLargeBins = 64;

  static size_t large_bin(size_t size_bytes) noexcept {
    return (size_bytes / kBlockAlignment * 0x9E3779B97F4A7C15U) >> 58U;
  }
  static void append(Block*& head, std::vector<Block*>& blocks);

  size_t large_bytes_max_;
  bool is_closed_ = false;
  size_t small_bytes_ = 0;
  size_t large_bytes_ = 0;
  // Lists by Block::next_cached; one of exact sizes a bin, and one of sizes that share a hash.
  std::array<Block*, kSmallBins> small_{};
  std::array<uint64_t, kSmallBins / 64 + 1> small_in_use_{};  // A bit a bin that may have blocks.
  std::array<Block*, kLargeBins> large_{};
};

// What a thread keeps of one stream's blocks, and where it counts.
struct MagazineSlot {
  MagazineSlot(Pool* slot_pool, StreamState* slot_stream, ThreadCounters* slot_counters,
               size_t large_bytes_max)
      : pool(slot_pool), stream(slot_stream), counters(slot_counters), magazine(large_bytes_max) {}

  Pool* const pool;
  StreamState* const stream;
  ThreadCounters* const counters;
  Magazine magazine;
};

class ThreadCache {
 public:
  // The calling thread's; null before create() and once the thread ends.
  static ThreadCache* current() noexcept;
  // The same, made at first use; null once the thread ends.
  static ThreadCache* create();

  ThreadCache() = default;
  ~ThreadCache();
  ThreadCache(const ThreadCache&) = delete;
  ThreadCache& operator=(const ThreadCache&) = delete;

  // The arena that the calling thread allocates from.
  static ArenaId current_arena() noexcept;
  // Gives the one before. Throws StateError on a thread that ends.
  static ArenaId set_current_arena(ArenaId arena);

  // Null where there is none. Need the lock, or are called by the thread itself. The first looks in
  // the current arena.
  MagazineSlot* find(const Pool* pool, StreamHandle stream) noexcept;
  MagazineSlot* find(const StreamState* stream) noexcept;
  ThreadCounters* counters_of(const Pool* pool) noexcept;

  // Called by the thread itself, with the lock.
  MagazineSlot* add(std::unique_ptr<MagazineSlot> slot);

  SpinLock lock;

 private:
  std::vector<std::unique_ptr<MagazineSlot>> slots_;
  MagazineSlot* latest_ = nullptr;  // The one that was found last.
  ArenaId arena_ = kDefaultArena;   // Of the thread alone; needs no lock.
};

// Initial-exec: one load instead of a call for each allocation. libspillover.so is loaded at run
// time and takes these eight bytes of the room that the C library keeps for such libraries.
extern thread_local constinit ThreadCache* t_thread_cache
    __attribute__((tls_model("initial-exec"), visibility("hidden")));

inline ThreadCache* ThreadCache::current() noexcept {
  return t_thread_cache;
}

inline ArenaId ThreadCache::current_arena() noexcept {
  return t_thread_cache == nullptr ? kDefaultArena : t_thread_cache->arena_;
}

inline MagazineSlot* ThreadCache::find(const Pool* pool, StreamHandle stream) noexcept {
  const auto matches = [&](const MagazineSlot& slot) {
    return slot.pool == pool && slot.stream->key.handle == stream && slot.stream->arena == arena_;
  };
  if (latest_ != nullptr && matches(*latest_)) return latest_;
  for (const auto& slot : slots_) {
    if (matches(*slot)) return latest_ = slot.get();
  }
  return nullptr;
}

inline MagazineSlot* ThreadCache::find(const StreamState* stream) noexcept {
  if (latest_ != nullptr && latest_->stream == stream) return latest_;
  for (const auto& slot : slots_) {
    if (slot->stream == stream) return latest_ = slot.get();
  }
  return nullptr;
}

inline Block* Magazine::take(size_t size_bytes) noexcept {
  if (size_bytes <= kSmallRequestMax) {
    Block*& head = small_[size_bytes / kBlockAlignment];
    Block* block = head;
    if (block == nullptr) return nullptr;
    head = block->next_cached;
    small_bytes_ -= size_bytes;
    return block;
  }
  Block** link = &large_[large_bin(size_bytes)];
  while (*link != nullptr && (*link)->size_bytes != size_bytes) link = &(*link)->next_cached;
  Block* block = *link;
  if (block == nullptr) return nullptr;
  *link = block->next_cached;
  large_bytes_ -= size_bytes;
  return block;
}

inline bool Magazine::put(Block* block) noexcept {
  const size_t size_bytes = block->size_bytes;
  if (is_closed_) return false;
  if (size_bytes <= kSmallRequestMax) {
    if (small_bytes_ + size_bytes > kSmallBytesMax) return false;
    const size_t bin = size_bytes / kBlockAlignment;
    block->next_cached = small_[bin];
    small_[bin] = block;
    small_in_use_[bin / 64] |= uint64_t{1} << (bin % 64);
    small_bytes_ += size_bytes;
    return true;
  }
  if (large_bytes_ + size_bytes > large_bytes_max_) return false;
  Block*& head = large_[large_bin(size_bytes)];
  block->next_cached = head;
  head = block;
  large_bytes_ += size_bytes;
  return true;
}

}  // namespace spillover
