// Walks the pool's structures and compares them with the equations in block.hpp, backing.hpp,
// address_space.hpp, magazine.hpp and thread_counters.hpp.
//
// Note [Checks at intervals]. A walk takes time with the number of blocks, so a release build walks
// when it is asked to. With the setting check_every=n the pool walks by itself at the end of each
// n-th allocation or free that takes the mutex: debug builds begin with it, and tests set it. What
// the magazines hold stays there, so that a check changes nothing that a program could tell. A
// broken equation then stops the process: the next block could be somebody else's.
#include <algorithm>
#include <array>
#include <map>
#include <string>

#include "allocator/expect.hpp"
#include "allocator/page_table.hpp"
#include "allocator/pool.hpp"
#include "allocator/statistics.hpp"
#include "base/check.hpp"
#include "base/error.hpp"

namespace spillover {

// What a walk over the segments finds, by class of blocks.
struct Pool::Totals {
  struct Sums {
    size_t segments = 0;
    size_t mapped_bytes = 0;
    size_t asleep_bytes = 0;
    size_t live = 0;
    size_t live_bytes = 0;
    size_t waiting = 0;
    size_t waiting_bytes = 0;
    size_t cached = 0;
    size_t cached_bytes = 0;
    size_t free_bytes = 0;
    size_t inactive_split = 0;
    size_t inactive_split_bytes = 0;
    size_t requested_bytes = 0;
  };
  struct HeapSums {
    size_t blocks = 0;
    size_t free = 0;
    size_t free_bytes = 0;
  };
  // The page that the last segment ended in: where addresses are fixed the next may share it.
  struct LastPage {
    DeviceAddress number = 0;
    size_t segments = 0;
    size_t counted_segments = 0;  // by the table
  };

  std::array<Sums, 2> by_class;  // Indexed by SizeClass.
  std::map<const Heap*, HeapSums> by_heap;
  std::map<ArenaId, size_t> mapped_bytes_by_arena;
  std::map<ArenaId, size_t> asleep_bytes_by_arena;
  std::map<const Block*, size_t> pending_uses;
  size_t blocks = 0;
  size_t outstanding_uses = 0;
  LastPage last_page;
};

namespace {

std::string name_of(const Block& block) {
  return "the block at " + std::to_string(block.address) + " (" + std::to_string(block.size_bytes) +
         " bytes) ";
}

void expect_of(const Block& block, bool condition, const char* sentence) {
  if (!condition) [[unlikely]]
    throw_broken(name_of(block) + sentence);
}

void check_block(const Block& block, int device) {
  expect_of(block,
            block.address % kBlockAlignment == 0 && block.size_bytes % kBlockAlignment == 0 &&
                block.size_bytes > 0,
            "is not aligned");
  expect_of(block, (block.state == BlockState::kWaiting) == (block.outstanding_uses > 0),
            "has outstanding uses that do not match its state");
  if (block.state == BlockState::kFree) {
    expect_of(block, block.requested_bytes == 0, "is free but was requested");
    expect_of(block, block.next == nullptr || block.next->state != BlockState::kFree,
              "and the next one are both free");
  } else {
    expect_of(block, block.requested_bytes > 0 && block.requested_bytes <= block.size_bytes,
              "is smaller than what was requested");
    expect_of(
        block,
        (block.size_bytes <= kSmallRequestMax) == (block.heap->size_class == SizeClass::kSmall),
        "is in the heap of the other class");
  }
  expect_of(block, block.state == BlockState::kLive || block.uses.empty(),
            "is not live but has noted streams");
  for (const DeviceStream& use : block.uses) {
    expect_of(block, use != DeviceStream{device, block.heap->stream->key},
              "has noted its own stream");
  }
  expect_of(block, block.freed_at <= block.heap->stream->freed_count,
            "was freed by a free that has not happened");
}

void check_marks(const StreamState& stream) {
  expect(stream.marks.size() <= StreamState::kMarksMax, "a stream has too many marks");
  uint64_t last = stream.completed_count;
  for (const StreamState::Mark& mark : stream.marks) {
    expect(mark.freed_count > last && mark.freed_count <= stream.freed_count,
           "a mark is not behind the one before it, or covers frees that have not happened");
    last = mark.freed_count;
  }
  uint64_t number = stream.completed_count;
  for (const StreamState::FreedRange& freed : stream.freed_ranges) {
    expect(freed.number >= number && freed.number <= stream.freed_count && freed.begin < freed.end,
           "the noted frees of a stream are not in order");
    number = freed.number;
  }
}

void expect_counter(const ClassCounters& counters, int index, size_t walked, const char* name) {
  const spillover_counter& counter = counters[index];
  if (counter.current != static_cast<int64_t>(walked)) {
    throw_broken(std::string("the counter ") + name + " of class " + std::to_string(index) +
                 " is " + std::to_string(counter.current) + ", a walk finds " +
                 std::to_string(walked));
  }
  if (counter.peak < counter.current) throw_broken(std::string("the peak of ") + name + " is low");
}

}  // namespace

// Gives the last block of the segment.
const Block* Pool::check_segment(const Block* first, Totals& totals) const {
  const Heap& heap = *first->heap;
  auto& sums = totals.by_class[static_cast<size_t>(heap.size_class)];
  auto& heap_sums = totals.by_heap[&heap];
  ++sums.segments;
  DeviceAddress expected = first->address;
  size_t used_count = 0;
  const Block* previous = nullptr;
  for (Block* block = segments_.at(first->address); block != nullptr; block = block->next) {
    expect_of(*block,
              block->address == expected && block->heap == &heap && block->previous == previous,
              "is not where its neighbours say");
    check_block(*block, device_);
    ++totals.blocks;
    ++heap_sums.blocks;
    const BlockState state = block->state;
    if (state != BlockState::kFree) {
      ++used_count;
      expect_of(*block, PageTable::instance().find(block->address) == block,
                "is not known to the table of pages");
    }
    if (state == BlockState::kLive) {
      ++sums.live;
      sums.live_bytes += block->size_bytes;
    } else if (state == BlockState::kWaiting) {
      const auto uses = totals.pending_uses.find(block);
      expect_of(*block,
                uses != totals.pending_uses.end() && uses->second == block->outstanding_uses,
                "waits for other uses than are pending");
      totals.outstanding_uses += block->outstanding_uses;
      ++sums.waiting;
      sums.waiting_bytes += block->size_bytes;
    } else if (state == BlockState::kCached) {
      ++sums.cached;
      sums.cached_bytes += block->size_bytes;
    } else {
      expect_of(*block, heap.free.count(block) == 1, "is free but not in its heap's set");
      ++heap_sums.free;
      heap_sums.free_bytes += block->size_bytes;
      sums.free_bytes += block->size_bytes;
      if (block->is_split()) {
        ++sums.inactive_split;
        sums.inactive_split_bytes += block->size_bytes;
      }
    }
    if (state == BlockState::kLive || state == BlockState::kWaiting) {
      sums.requested_bytes += block->requested_bytes;
    }
    expected += block->size_bytes;
    previous = block;
  }
  expect_of(*first, first->next == nullptr || !heap.stream->is_whole,
            "shares its segment, in a heap of whole blocks");
  const AddressRange range{first->address, expected};
  sums.mapped_bytes += range.size_bytes();
  totals.mapped_bytes_by_arena[heap.stream->arena] += range.size_bytes();
  const size_t asleep_bytes = backing_.asleep_bytes_in(range);
  sums.asleep_bytes += asleep_bytes;
  totals.asleep_bytes_by_arena[heap.stream->arena] += asleep_bytes;
  expect(asleep_bytes == 0 || heap.stream->is_asleep, "a chunk sleeps in an arena that does not");
  const AddressRange chunks = backing_.chunks_within(range);
  expect(chunks.begin == range.begin && chunks.end == range.end,
         "the blocks of a segment do not cover whole chunks");
  expect(backing_.is_virtual() || backing_.first_chunks(chunks, 1).end == chunks.end,
         "a segment spans chunks that the driver takes back one by one");
  check_pages(range, used_count, totals);
  return previous;
}

// Segments come in the order of their addresses.
void Pool::check_pages(const AddressRange& segment, size_t used_count, Totals& totals) const {
  const PageTable& table = PageTable::instance();
  expect(table.block_count(segment.begin, segment.end) == used_count,
         "the table of pages knows blocks that are free");
  auto& last = totals.last_page;
  const DeviceAddress end = PageTable::page_number(segment.end - 1);
  for (DeviceAddress number = PageTable::page_number(segment.begin); number <= end; ++number) {
    if (number != last.number) {
      expect(last.segments == last.counted_segments, "a page is of more segments than lie in it");
      const DeviceAddress address = std::max(segment.begin, PageTable::first_address(number));
      last = {number, 0, table.range_count(address, this)};
    }
    ++last.segments;
    expect(last.segments <= last.counted_segments, "a page of a segment is not in the table");
  }
}

void Pool::check_streams(const Totals& totals) const {
  size_t heap_count = 0;
  for (const auto& [key, stream] : streams_) {
    expect(key == StreamStates::key_type(stream.key, stream.arena), "a stream has another's place");
    expect(stream.completed_count <= stream.freed_count, "more frees are complete than happened");
    check_marks(stream);
    expect(!is_private_arena(stream.arena) || stream.marks.empty(), "a private arena has marks");
    expect(stream.is_private() == (private_arenas_.count(stream.arena) != 0),
           "a private arena is in use and released");
    expect(stream.is_asleep == is_asleep(stream.arena), "a stream sleeps and its arena does not");
    for (const Heap& heap : stream.heaps) {
      const auto walked = totals.by_heap.find(&heap);
      const bool is_empty = walked == totals.by_heap.end();
      const Totals::HeapSums sums = is_empty ? Totals::HeapSums{} : walked->second;
      if (!is_empty) ++heap_count;
      expect(heap.block_count == sums.blocks, "a heap's number of blocks does not add up");
      expect(heap.free.size() == sums.free, "a heap's set has blocks that are not free");
      expect(heap.free_bytes == sums.free_bytes, "a heap's free bytes do not add up");
    }
  }
  expect(heap_count == totals.by_heap.size(), "a segment is of a stream that is forgotten");
}

void Pool::check_magazines(const Totals& totals) const {
  size_t cached = 0;
  for (const MagazineReference& reference : magazines_) {
    const StreamState& stream = *reference.slot->stream;
    const auto known = streams_.find({stream.key, stream.arena});
    expect(known != streams_.end() && &known->second == &stream && stream.is_immortal &&
               !is_private_arena(stream.arena),
           "a magazine is of a stream that may be forgotten");
    expect(reference.slot->magazine.is_closed() == stream.is_asleep,
           "a magazine of memory that sleeps is open, or another one closed");
    cached += reference.slot->magazine.check_invariants(stream);
  }
  expect(cached == totals.by_class[0].cached + totals.by_class[1].cached,
         "the magazines do not hold the blocks that are cached");
}

void Pool::check_thread_counters() const {
  for (const auto& counters : counters_) {
    for (const auto& [all, small, large] : counters->sums) {
      expect(all.change.get() == small.change.get() + large.change.get() &&
                 all.added.get() == small.added.get() + large.added.get(),
             "a thread's counters of classes do not add up");
      for (const ThreadCounters::Sum* sum : {&all, &small, &large}) {
        expect(sum->largest.get() >= sum->change.get() && sum->largest.get() >= 0 &&
                   sum->added.get() >= 0,
               "a thread's counter was larger than its largest");
      }
    }
  }
}

void Pool::check_totals(const Totals& totals) const {
  Totals::Sums all;
  for (const SizeClass size_class : kSizeClasses) {
    const auto& sums = totals.by_class[static_cast<size_t>(size_class)];
    expect(sums.live_bytes + sums.waiting_bytes + sums.cached_bytes + sums.free_bytes ==
               sums.mapped_bytes,
           "used and free bytes do not add up to the mapped ones");
    expect(mapped_bytes_[static_cast<size_t>(size_class)] == sums.mapped_bytes,
           "the mapped bytes of a class do not add up");
    expect(asleep_bytes_[static_cast<size_t>(size_class)] == sums.asleep_bytes,
           "the bytes of a class that sleep do not add up");
    all.segments += sums.segments;
    all.asleep_bytes += sums.asleep_bytes;
    all.mapped_bytes += sums.mapped_bytes;
    all.live += sums.live;
    all.live_bytes += sums.live_bytes;
    all.waiting += sums.waiting;
    all.waiting_bytes += sums.waiting_bytes;
    all.inactive_split += sums.inactive_split;
    all.inactive_split_bytes += sums.inactive_split_bytes;
    all.requested_bytes += sums.requested_bytes;
  }
  expect(all.mapped_bytes ==
                 backing_.mapped_bytes() + backing_.detached_bytes() + backing_.asleep_bytes() &&
             all.asleep_bytes == backing_.asleep_bytes(),
         "a chunk belongs to no segment");
  for (const auto& [arena, usage] : arenas_) {
    const auto walked = totals.mapped_bytes_by_arena.find(arena);
    const size_t walked_bytes =
        walked == totals.mapped_bytes_by_arena.end() ? size_t{0} : walked->second;
    expect(usage.mapped_bytes == walked_bytes, "the mapped bytes of an arena do not add up");
    expect(usage.mapped_bytes_peak >= walked_bytes, "the peak of an arena is low");
    const auto asleep = totals.asleep_bytes_by_arena.find(arena);
    expect(usage.asleep_bytes ==
               (asleep == totals.asleep_bytes_by_arena.end() ? size_t{0} : asleep->second),
           "the bytes of an arena that sleep do not add up");
  }
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
  const auto& small = totals.by_class[static_cast<size_t>(SizeClass::kSmall)];
  compare(small, SPILLOVER_CLASS_SMALL);
  compare(totals.by_class[static_cast<size_t>(SizeClass::kLarge)], SPILLOVER_CLASS_LARGE);
  // Cached chunks count as large.
  const size_t held_bytes = backing_.held_bytes();
  expect_counter(s.reserved_bytes, SPILLOVER_CLASS_ALL, held_bytes, "reserved_bytes");
  const size_t small_bytes = small.mapped_bytes - small.asleep_bytes;
  expect_counter(s.reserved_bytes, SPILLOVER_CLASS_SMALL, small_bytes, "reserved_bytes");
  expect_counter(s.reserved_bytes, SPILLOVER_CLASS_LARGE, held_bytes - small_bytes,
                 "reserved_bytes");
}

// Needs the mutex and still magazines.
void Pool::walk() const {
  Totals totals;
  totals.pending_uses = pending_.count_by_block();
  backing_.check_invariants();
  DeviceAddress end = 0;
  for (const auto& [address, first] : segments_) {
    expect_of(*first, address == first->address && address >= end && first->previous == nullptr,
              "does not start a segment");
    end = check_segment(first, totals)->end();
  }
  expect(totals.last_page.segments == totals.last_page.counted_segments,
         "a page is of more segments than lie in it");
  expect(totals.blocks == blocks_.in_use(), "the store of blocks has blocks of no segment");
  size_t pending_count = 0;
  for (const auto& [block, count] : totals.pending_uses) pending_count += count;
  expect(pending_count == totals.outstanding_uses, "uses are pending for blocks that do not wait");
  check_streams(totals);
  check_magazines(totals);
  check_thread_counters();
  check_totals(totals);
}

void Pool::check_invariants() {
  const std::lock_guard lock(mutex_);
  const StillMagazines still(*this, StillMagazines::Contents::kLeft);
  walk();
}

void Pool::check_at_intervals() noexcept {
  if (++unchecked_count_ < settings_.check_every) return;
  unchecked_count_ = 0;
  const StillMagazines still(*this, StillMagazines::Contents::kLeft);
  try {
    walk();
  } catch (const StateError& error) {
    check_failed("Pool::check_invariants()", __FILE__, __LINE__, error.what());
  }
}

}  // namespace spillover
