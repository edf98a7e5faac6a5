// Walks the pool's structures and compares them with the equations in block.hpp and backing.hpp.
#include <array>
#include <string>

#include "allocator/page_table.hpp"
#include "allocator/pool.hpp"
#include "allocator/statistics.hpp"
#include "base/error.hpp"

namespace spillover {

// What a walk over the segments finds, by class of blocks.
struct Pool::Totals {
  struct Sums {
    size_t segments = 0;
    size_t mapped_bytes = 0;
    size_t live = 0;
    size_t live_bytes = 0;
    size_t waiting = 0;
    size_t waiting_bytes = 0;
    size_t free_bytes = 0;
    size_t inactive_split = 0;
    size_t inactive_split_bytes = 0;
    size_t requested_bytes = 0;
  };
  std::array<Sums, 2> by_class;  // Indexed by SizeClass.
  size_t blocks = 0;
  size_t outstanding_uses = 0;
};

namespace {

void expect(bool condition, const std::string& sentence) {
  if (!condition) throw StateError("broken invariant of the device pool: " + sentence);
}

std::string name_of(const Block& block) {
  return "the block at " + std::to_string(block.address) + " (" + std::to_string(block.size_bytes) +
         " bytes)";
}

void check_block(const Block& block) {
  expect(block.address % kBlockAlignment == 0 && block.size_bytes % kBlockAlignment == 0 &&
             block.size_bytes > 0,
         name_of(block) + " is not aligned");
  expect((block.state == BlockState::kWaiting) == (block.outstanding_uses > 0),
         name_of(block) + " has outstanding uses that do not match its state");
  if (block.state == BlockState::kFree) {
    expect(block.requested_bytes == 0, name_of(block) + " is free but was requested");
    expect(block.next == nullptr || block.next->state != BlockState::kFree,
           name_of(block) + " and the next one are both free");
  } else {
    expect(block.requested_bytes > 0 && block.requested_bytes <= block.size_bytes,
           name_of(block) + " is smaller than what was requested");
  }
  expect(block.state == BlockState::kLive || block.uses.empty(),
         name_of(block) + " is not live but has noted streams");
  expect(block.freed_at <= block.heap->stream->freed_count,
         name_of(block) + " was freed by a free that has not happened");
}

void expect_counter(const ClassCounters& counters, int index, size_t walked, const char* name) {
  const spillover_counter& counter = counters[index];
  expect(counter.current == static_cast<int64_t>(walked),
         std::string("the counter ") + name + " of class " + std::to_string(index) + " is " +
             std::to_string(counter.current) + ", a walk finds " + std::to_string(walked));
  expect(counter.peak >= counter.current, std::string("the peak of ") + name + " is too low");
}

}  // namespace

// Gives the last block of the segment.
const Block* Pool::check_segment(const Block* first, Totals& totals) const {
  const Heap& heap = *first->heap;
  auto& sums = totals.by_class[static_cast<size_t>(heap.size_class)];
  ++sums.segments;
  DeviceAddress expected = first->address;
  const Block* previous = nullptr;
  for (Block* block = segments_.at(first->address); block != nullptr; block = block->next) {
    expect(block->address == expected && block->heap == &heap && block->previous == previous,
           name_of(*block) + " is not where its neighbours say");
    const Block* known = PageTable::instance().find(block->address);
    expect(block->state == BlockState::kFree ? known != block : known == block,
           name_of(*block) + " and the table of pages disagree");
    check_block(*block);
    ++totals.blocks;
    totals.outstanding_uses += block->outstanding_uses;
    sums.requested_bytes += block->requested_bytes;
    if (block->state == BlockState::kLive) {
      ++sums.live;
      sums.live_bytes += block->size_bytes;
    } else if (block->state == BlockState::kWaiting) {
      ++sums.waiting;
      sums.waiting_bytes += block->size_bytes;
    } else {
      expect(heap.free.count(block) == 1, name_of(*block) + " is free but not in its heap's set");
      sums.free_bytes += block->size_bytes;
      if (block->is_split()) {
        ++sums.inactive_split;
        sums.inactive_split_bytes += block->size_bytes;
      }
    }
    expected += block->size_bytes;
    previous = block;
  }
  const AddressRange range{first->address, expected};
  sums.mapped_bytes += range.size_bytes();
  const AddressRange chunks = backing_.chunks_within(range);
  expect(chunks.begin == range.begin && chunks.end == range.end,
         "the blocks of a segment do not cover whole chunks");
  return previous;
}

void Pool::check_streams(const Totals& totals) const {
  size_t block_count = 0;
  size_t free_bytes = 0;
  for (const auto& [key, stream] : streams_) {
    expect(stream.completed_count <= stream.freed_count, "more frees are complete than happened");
    for (const Heap& heap : stream.heaps) {
      size_t heap_bytes = 0;
      for (const Block* block : heap.free) heap_bytes += block->size_bytes;
      expect(heap_bytes == heap.free_bytes, "a heap's free bytes do not add up");
      block_count += heap.block_count;
      free_bytes += heap_bytes;
    }
  }
  expect(block_count == totals.blocks, "the heaps' numbers of blocks do not add up");
  expect(free_bytes == totals.by_class[0].free_bytes + totals.by_class[1].free_bytes,
         "the heaps have blocks that are not free");
}

void Pool::check_totals(const Totals& totals) const {
  Totals::Sums all;
  for (const SizeClass size_class : {SizeClass::kSmall, SizeClass::kLarge}) {
    const auto& sums = totals.by_class[static_cast<size_t>(size_class)];
    expect(sums.live_bytes + sums.waiting_bytes + sums.free_bytes == sums.mapped_bytes,
           "used and free bytes do not add up to the mapped ones");
    expect(mapped_bytes_[static_cast<size_t>(size_class)] == sums.mapped_bytes,
           "the mapped bytes of a class do not add up");
    all.segments += sums.segments;
    all.mapped_bytes += sums.mapped_bytes;
    all.live += sums.live;
    all.live_bytes += sums.live_bytes;
    all.waiting += sums.waiting;
    all.waiting_bytes += sums.waiting_bytes;
    all.inactive_split += sums.inactive_split;
    all.inactive_split_bytes += sums.inactive_split_bytes;
    all.requested_bytes += sums.requested_bytes;
  }
  expect(all.mapped_bytes == backing_.mapped_bytes(), "a chunk belongs to no segment");
  expect_counter(statistics_.reserved_bytes, SPILLOVER_CLASS_ALL, backing_.held_bytes(),
                 "reserved_bytes");
  const spillover_stats_t s = this->totals();
  const auto compare = [&s](const Totals::Sums& sums, int index) {
    expect_counter(s.segment, index, sums.segments, "segment");
    expect_counter(s.allocation, index, sums.live, "allocation");
    expect_counter(s.allocated_bytes, index, sums.live_bytes, "allocated_bytes");
    expect_counter(s.active, index, sums.live + sums.waiting, "active");
    expect_counter(s.active_bytes, index, sums.live_bytes + sums.waiting_bytes, "active_bytes");
    expect_counter(s.inactive_split, index, sums.inactive_split, "inactive_split");
    expect_counter(s.inactive_split_bytes, index, sums.inactive_split_bytes,
                   "inactive_split_bytes");
    expect_counter(s.requested_bytes, index, sums.requested_bytes, "requested_bytes");
  };
  compare(all, SPILLOVER_CLASS_ALL);
  compare(totals.by_class[static_cast<size_t>(SizeClass::kSmall)], SPILLOVER_CLASS_SMALL);
  compare(totals.by_class[static_cast<size_t>(SizeClass::kLarge)], SPILLOVER_CLASS_LARGE);
}

void Pool::check_invariants() {
  const std::lock_guard lock(mutex_);
  const StillMagazines still(*this);
  Totals totals;
  DeviceAddress end = 0;
  for (const auto& [address, first] : segments_) {
    expect(address == first->address && address >= end && first->previous == nullptr,
           name_of(*first) + " does not start a segment");
    end = check_segment(first, totals)->end();
  }
  expect(totals.blocks == blocks_.in_use(), "the store of blocks has blocks of no segment");
  expect(pending_.count() == totals.outstanding_uses,
         "the pending uses do not match the waiting blocks");
  check_streams(totals);
  check_totals(totals);
}

}  // namespace spillover
