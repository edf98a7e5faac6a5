// Marks on streams: when they are recorded, what they tell, and the wait for one on the device.
//
// Note [Watermarks]. A *watermark* is a mark that is recorded where memory is freed. A mark that is
// recorded only when memory has run out stands at the stream's tail, behind everything that was
// submitted since the free; in a pipeline that work may wait for what another stream does once it
// has got its memory, and the mark is never reached. So a stream gets a watermark for each
// watermark_bytes() that are freed on it:
//   - only once a second stream has taken memory: a program with one stream records no event, since
//     nobody waits for anybody;
//   - at the free where the stream may be asked then, else where its user passes it to the pool
//     (Note [Foreign streams]), covering the frees before; the event outlives the stream;
//   - magazines keep no more than that of large blocks each, so that no thread holds back frees
//     that no watermark covers. Up to it they take no lock and record nothing, as before;
//   - never on a capturing stream, nor on the legacy default stream while a stream that it orders
//     with captures: the next free tries again.
// What no watermark covers of a stream that may be asked is at most watermark_bytes(), and what its
// magazines hold. Of a foreign one it is what was freed since it was passed to the pool last, and
// of all streams what was freed before there was a second one: that gets a mark at the tails then.
// Of many marks that are not reached every second one goes: a later one covers what it did.
//
// A free block merges with neighbours that were freed later, and their number is the block's. So
// that this hides nothing, ranges that were freed lately are kept beside the heap (freed_ranges):
// what of a block lies in none of them is complete, and whole chunks of that are stolen and
// remapped.
//
// Note [Waiting behind a watermark]. A request that no completed free serves waits on the host
// first: it polls the marks, oldest first, and goes on at the first that is enough, whatever is
// behind it. Other ways to wait come after that one:
//   - The host's wait has an end, and what ends it is an error that says so. Neither holds for a
//     wait that is submitted to the device, which also holds up all that comes later on the stream.
//     So it is made when the time has run out and nothing else has helped, as the alternative to
//     failing.
//   - It is made for a watermark only, never for a mark at a tail. Between streams that wait for
//     each other by events there is no deadlock: an event is recorded before it is waited for, so
//     each wait points to what was submitted earlier. Work that waits for something else (a
//     receive, a value in memory, a function of the host) may depend on what is submitted later,
//     and deadlocks where that is behind the wait. In front of a watermark is only what its stream
//     was given before memory was freed, or before its user asked for more. A program deadlocks on
//     it if that depends on what the request's stream does next; then no wait could have had the
//     memory, and only failing would have been better. What depends on the requesting thread, or on
//     any other stream, goes on. In front of a tail is all that was submitted until the shortage:
//     in a pipeline it is the rule, not the exception, that this waits for the request's stream.
//   - A wait for the whole device is a wait for all tails, and has no end: it is left out where the
//     host's wait for marks has run out of time.
// Memory is handed over where it lies, as unmapping is not ordered with streams. For the stream
// that gets it the change of hands counts as a free: a third stream must not have it before the
// watermark is reached.
#include <algorithm>

#include "allocator/pool.hpp"
#include "base/error.hpp"
#include "driver/context.hpp"

namespace spillover {
namespace {

// A share of the device's memory, within limits: an event costs about a microsecond.
constexpr size_t kWatermarkShare = 1024;
constexpr size_t kWatermarkMin = 2 * kMiB;
constexpr size_t kWatermarkMax = 32 * kMiB;
// A foreign stream may not be passed to the pool again.
constexpr size_t kForeignWatermark = 2 * kMiB;

constexpr size_t kFreedRangesMax = 512;  // A stream.

}  // namespace

size_t Pool::watermark_bytes() const {
  return std::clamp(device_bytes_ / kWatermarkShare, kWatermarkMin, kWatermarkMax);
}

// The stream was passed to the pool by its user, so it is alive.
void Pool::note_alive(StreamState& stream) {
  if (!serves_several_streams_) {
    if (streams_.begin()->second.key == streams_.rbegin()->second.key) return;
    watch_streams();
  }
  if (is_private_arena(stream.arena)) return;
  mark_if_due(stream, stream.is_immortal ? watermark_bytes() : kForeignWatermark,
              StreamState::MarkKind::kWatermark);
}

// Begins to record watermarks, with a mark behind all that was freed so far.
void Pool::watch_streams() {
  for (const MagazineReference& reference : magazines_) {
    const std::lock_guard lock(reference.cache->lock);
    reference.slot->magazine.limit_large(watermark_bytes());
  }
  empty_magazines();
  serves_several_streams_ = true;
  for (auto& [key, stream] : streams_) {
    stream.ranges_since = stream.freed_count;
    if (!may_ask(stream)) continue;
    mark_if_due(stream, watermark_bytes(), StreamState::MarkKind::kTail);
  }
}

// The stream is alive. Where no mark can be had its frees stay unmarked, and the next one tries
// again.
void Pool::mark_if_due(StreamState& stream, size_t threshold_bytes,
                       StreamState::MarkKind kind) noexcept {
  if (serves_several_streams_ && stream.unmarked_bytes >= threshold_bytes) try_mark(stream, kind);
}

// False where there is no mark. A device that has failed tells so where somebody can be told.
bool Pool::try_mark(StreamState& stream, StreamState::MarkKind kind) noexcept {
  try {
    const RelaxedCaptureScope relaxed;
    if (stream.marks.size() >= StreamState::kMarksMax) collect_marks(stream);
    return mark(stream, kind);
  } catch (const Error&) {
    return false;
  }
}

// Covers all frees of a stream that is alive. False where it captures, or the driver refuses.
bool Pool::mark(StreamState& stream, StreamState::MarkKind kind) {
  const uint64_t covered_count =
      stream.marks.empty() ? stream.completed_count : stream.marks.back().freed_count;
  if (covered_count == stream.freed_count) return true;
  Event event = spare_events_.take(device_);
  if (event.try_record(stream.key.handle) != RecordOutcome::kRecorded) {
    spare_events_.give(std::move(event));
    return false;
  }
  if (stream.marks.size() >= StreamState::kMarksMax) thin_marks(stream);
  stream.marks.push_back({std::move(event), stream.freed_count, kind});
  stream.unmarked_bytes = 0;
  return true;
}

// Lets go of up to every second mark. A watermark goes only where another one follows.
void Pool::thin_marks(StreamState& stream) {
  using Kind = StreamState::MarkKind;
  std::deque<StreamState::Mark> kept;
  bool was_dropped = false;
  for (size_t i = 0; i < stream.marks.size(); ++i) {
    StreamState::Mark& mark = stream.marks[i];
    const bool is_covered =
        i + 1 < stream.marks.size() &&
        (mark.kind == Kind::kTail || stream.marks[i + 1].kind == Kind::kWatermark);
    was_dropped = is_covered && !was_dropped;
    if (was_dropped) {
      spare_events_.give(std::move(mark.event));
    } else {
      kept.push_back(std::move(mark));
    }
  }
  stream.marks = std::move(kept);
}

// Learns which marks were reached, oldest first. Throws DriverError.
void Pool::collect_marks(StreamState& stream) {
  while (!stream.marks.empty() && stream.marks.front().event.is_complete()) {
    complete_frees(stream, stream.marks.front().freed_count);
  }
}

// The stream has done what was submitted before its frees up to that number.
void Pool::complete_frees(StreamState& stream, uint64_t freed_count) {
  stream.completed_count = std::max(stream.completed_count, freed_count);
  while (!stream.marks.empty() && stream.marks.front().freed_count <= stream.completed_count) {
    spare_events_.give(std::move(stream.marks.front().event));
    stream.marks.pop_front();
  }
  while (!stream.freed_ranges.empty() &&
         stream.freed_ranges.front().number <= stream.completed_count) {
    stream.freed_ranges.pop_front();
  }
  if (stream.completed_count == stream.freed_count) stream.unmarked_bytes = 0;
}

// A range of the stream's memory was freed: its latest free.
void Pool::note_freed(const Heap& heap, const AddressRange& range) {
  StreamState& stream = *heap.stream;
  stream.unmarked_bytes += range.size_bytes();
  if (!serves_several_streams_ || heap.size_class == SizeClass::kSmall) return;
  if (stream.freed_ranges.size() >= kFreedRangesMax) {
    const auto half = stream.freed_ranges.begin() + kFreedRangesMax / 2;
    stream.ranges_since = std::prev(half)->number;
    stream.freed_ranges.erase(stream.freed_ranges.begin(), half);
  }
  stream.freed_ranges.push_back({range.begin, range.end, stream.freed_count});
}

// The parts of a free block that are complete once the stream's frees up to that number are, by
// address.
std::vector<AddressRange> Pool::complete_parts(const Block& block, uint64_t completed_count) const {
  const StreamState& stream = *block.heap->stream;
  if (block.freed_at <= completed_count) return {{block.address, block.end()}};
  if (!serves_several_streams_ || stream.ranges_since > completed_count ||
      block.heap->size_class == SizeClass::kSmall) {
    return {};
  }
  std::vector<AddressRange> pending;
  for (const StreamState::FreedRange& freed : stream.freed_ranges) {
    if (freed.number <= completed_count) continue;
    if (freed.begin < block.end() && freed.end > block.address) {
      pending.push_back({freed.begin, freed.end});
    }
  }
  std::sort(pending.begin(), pending.end(),
            [](const AddressRange& a, const AddressRange& b) { return a.begin < b.begin; });
  std::vector<AddressRange> parts;
  DeviceAddress position = block.address;
  for (const AddressRange& range : pending) {
    if (range.begin > position) parts.push_back({position, range.begin});
    position = std::max(position, range.end);
  }
  if (position < block.end()) parts.push_back({position, block.end()});
  return parts;
}

// Memory of another stream that the request's stream waits for on the device; null where none is
// covered by a watermark. See Note [Waiting behind a watermark].
Block* Pool::take_behind_watermark(const Request& request) {
  if (is_private_arena(request.arena)) return nullptr;  // Graphs would not wait.
  Heap& heap = heap_of(request);
  for (auto& [key, stream] : streams_) {
    if (stream.key == request.stream || !stream.serves_others()) continue;
    for (const StreamState::Mark& mark : stream.marks) {
      if (mark.kind != StreamState::MarkKind::kWatermark) continue;
      for (Heap& victim : stream.heaps) {
        const auto run = find_run(victim, request, mark.freed_count);
        if (!run) continue;
        if (mark.event.try_put_before(request.stream.handle) != RecordOutcome::kRecorded) {
          return nullptr;
        }
        const CountOnExit count(*this);
        announce(SegmentChange::kGoing, victim, run->chunks);
        carve(run->block, run->chunks);
        Block* block = adopt(heap, run->chunks, ++heap.stream->freed_count);
        remove_free(block);
        return block;
      }
    }
  }
  return nullptr;
}

}  // namespace spillover
