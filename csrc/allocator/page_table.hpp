// From a device address to the pool and the block that it belongs to, without a lock.
//
// One table for the process, leaked. It has an entry for each page of 2 MiB that a pool has mapped.
// A page of small blocks has a slot for each address at which a block can start. Blocks of large
// heaps that are not free exceed 1 MiB, so at most one of them starts in each half of a page, and
// two slots do.
//
// insert(), erase(), set() and clear() are called under the mutex of the pool that owns the page;
// the others by any thread at any time. Pages are reused and never deleted, so that a lookup of an
// address that is unmapped meanwhile, which is a caller's mistake, still reads a page.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <mutex>
#include <vector>

#include "driver/types.hpp"

namespace spillover {

class Pool;
struct Block;

enum class PageKind {
  kDense,   // a block may start at any multiple of 512 bytes
  kSparse,  // blocks that are not free exceed half a page
};

class PageTable {
 public:
  static PageTable& instance();

  // Whether the range of memory from elsewhere, which shares pages with others, can be inserted as
  // kDense for the pool: it is where the table reaches, and in no page of another pool or kind.
  bool accepts(DeviceAddress begin, DeviceAddress end, const Pool* pool) const;

  // [begin, end), of which the first and the last page may be shared with other ranges of the pool.
  void insert(DeviceAddress begin, DeviceAddress end, Pool* pool, PageKind kind);
  void erase(DeviceAddress begin, DeviceAddress end);

  // Makes a block known by its first address, while it is not free.
  void set(Block* block);
  void clear(const Block& block);

  // The block that set() made known for an address in the same slot; null where there is none.
  Block* find(DeviceAddress address) const;
  // Null where no pool has mapped the address.
  Pool* pool_of(DeviceAddress address) const;

  // For the invariants: how many of the pool's ranges lie in the page of the address, 0 where it is
  // not the pool's, and how many blocks are known whose slots begin within [begin, end).
  size_t range_count(DeviceAddress address, const Pool* pool) const;
  size_t block_count(DeviceAddress begin, DeviceAddress end) const;
  static DeviceAddress page_number(DeviceAddress address) { return address >> kPageBits; }
  static DeviceAddress first_address(DeviceAddress page) { return page << kPageBits; }

 private:
  static constexpr size_t kPageBits = 21;
  static constexpr size_t kLeafBits = 13;
  static constexpr size_t kAddressBits = 52;
  static constexpr size_t kLeafSize = size_t{1} << kLeafBits;
  static constexpr size_t kRootSize = size_t{1} << (kAddressBits - kPageBits - kLeafBits);

  struct Page {
    Pool* pool;
    size_t slot_shift;  // log2 of a slot's bytes
    size_t use_count;   // ranges in it
    std::atomic<Block*>* slots;

    std::atomic<Block*>& slot(DeviceAddress address) const {
      return slots[(address & ((size_t{1} << kPageBits) - 1)) >> slot_shift];
    }
  };
  using Leaf = std::array<std::atomic<Page*>, kLeafSize>;

  Page* page_of(DeviceAddress address) const;
  std::atomic<Page*>& entry_of(DeviceAddress address);
  Page* take_page(Pool* pool, PageKind kind);

  std::array<std::atomic<Leaf*>, kRootSize> root_{};
  std::mutex mutex_;                         // Guards what follows; a leaf.
  std::array<std::vector<Page*>, 2> spare_;  // By PageKind.
};

inline PageTable::Page* PageTable::page_of(DeviceAddress address) const {
  const size_t page = address >> kPageBits;
  if (page >> kLeafBits >= kRootSize) return nullptr;
  const Leaf* leaf = root_[page >> kLeafBits].load(std::memory_order_acquire);
  return leaf == nullptr ? nullptr
                         : (*leaf)[page & (kLeafSize - 1)].load(std::memory_order_acquire);
}

inline Block* PageTable::find(DeviceAddress address) const {
  const Page* page = page_of(address);
  return page == nullptr ? nullptr : page->slot(address).load(std::memory_order_acquire);
}

inline Pool* PageTable::pool_of(DeviceAddress address) const {
  const Page* page = page_of(address);
  return page == nullptr ? nullptr : page->pool;
}

}  // namespace spillover
