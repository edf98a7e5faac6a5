#include "allocator/page_table.hpp"

#include <algorithm>
#include <string>

#include "allocator/block.hpp"
#include "base/check.hpp"
#include "base/error.hpp"

namespace spillover {
namespace {

constexpr size_t kDenseShift = 9;    // 512 bytes
constexpr size_t kSparseShift = 20;  // half a page

}  // namespace

PageTable& PageTable::instance() {
  static auto& table = *new PageTable;
  return table;
}

std::atomic<PageTable::Page*>& PageTable::entry_of(DeviceAddress address) {
  const size_t page = address >> kPageBits;
  if (page >> kLeafBits >= kRootSize) {
    throw StateError("the driver gave device memory at the address " + std::to_string(address) +
                     ", beyond the " + std::to_string(kAddressBits) + " bits that are expected");
  }
  std::atomic<Leaf*>& slot = root_[page >> kLeafBits];
  Leaf* leaf = slot.load(std::memory_order_acquire);
  if (leaf == nullptr) {
    const std::lock_guard lock(mutex_);
    leaf = slot.load(std::memory_order_acquire);
    if (leaf == nullptr) {
      leaf = new Leaf{};
      slot.store(leaf, std::memory_order_release);
    }
  }
  return (*leaf)[page & (kLeafSize - 1)];
}

PageTable::Page* PageTable::take_page(Pool* pool, PageKind kind) {
  const std::lock_guard lock(mutex_);
  auto& spare = spare_[static_cast<size_t>(kind)];
  if (!spare.empty()) {
    Page* page = spare.back();
    spare.pop_back();
    page->pool = pool;
    return page;
  }
  const size_t shift = kind == PageKind::kDense ? kDenseShift : kSparseShift;
  auto* slots = new std::atomic<Block*>[size_t{1} << (kPageBits - shift)]();
  return new Page{pool, shift, 0, slots};
}

bool PageTable::accepts(DeviceAddress begin, DeviceAddress end, const Pool* pool) const {
  if (begin == 0 || begin >= end || (end - 1) >> kAddressBits != 0) return false;
  for (size_t number = begin >> kPageBits; number <= (end - 1) >> kPageBits; ++number) {
    const Page* page = page_of(number << kPageBits);
    if (page == nullptr) continue;
    if (page->pool != pool || page->slot_shift != kDenseShift) return false;
  }
  return true;
}

void PageTable::insert(DeviceAddress begin, DeviceAddress end, Pool* pool, PageKind kind) {
  for (size_t number = begin >> kPageBits; number <= (end - 1) >> kPageBits; ++number) {
    std::atomic<Page*>& entry = entry_of(number << kPageBits);
    Page* page = entry.load(std::memory_order_relaxed);
    if (page == nullptr) {
      page = take_page(pool, kind);
      entry.store(page, std::memory_order_release);
    }
    ++page->use_count;
  }
}

void PageTable::erase(DeviceAddress begin, DeviceAddress end) {
  for (size_t number = begin >> kPageBits; number <= (end - 1) >> kPageBits; ++number) {
    std::atomic<Page*>& entry = entry_of(number << kPageBits);
    Page* page = entry.load(std::memory_order_relaxed);
    SPILLOVER_CHECK(page != nullptr && page->use_count > 0, "a page is not in the table");
    if (--page->use_count > 0) continue;
    entry.store(nullptr, std::memory_order_release);
    const auto kind = page->slot_shift == kDenseShift ? PageKind::kDense : PageKind::kSparse;
    const std::lock_guard lock(mutex_);
    spare_[static_cast<size_t>(kind)].push_back(page);
  }
}

void PageTable::set(Block* block) {
  page_of(block->address)->slot(block->address).store(block, std::memory_order_release);
}

void PageTable::clear(const Block& block) {
  page_of(block.address)->slot(block.address).store(nullptr, std::memory_order_release);
}

size_t PageTable::range_count(DeviceAddress address, const Pool* pool) const {
  const Page* page = page_of(address);
  return page == nullptr || page->pool != pool ? 0 : page->use_count;
}

size_t PageTable::block_count(DeviceAddress begin, DeviceAddress end) const {
  size_t count = 0;
  for (DeviceAddress address = begin; address < end;) {
    const Page* page = page_of(address);
    const DeviceAddress page_end = (page_number(address) + 1) << kPageBits;
    if (page != nullptr) {
      const size_t slot_bytes = size_t{1} << page->slot_shift;
      for (; address < std::min(end, page_end); address += slot_bytes) {
        if (page->slot(address).load(std::memory_order_relaxed) != nullptr) ++count;
      }
    }
    address = page_end;
  }
  return count;
}

}  // namespace spillover
