#include "trace/recorder.hpp"

#include <pthread.h>

#include <algorithm>
#include <bit>
#include <ctime>
#include <memory>
#include <mutex>
#include <string>

#include "base/error.hpp"

namespace spillover {

namespace trace_internal {
std::atomic<bool> is_on{false};
}

namespace {

// An event in the ring. Words are atomic so that a reader may look while a writer writes; state
// tells it whether what it read belongs together. Stores are releases, which makes each of them
// visible no earlier than the state before it; on x86 that costs nothing.
struct alignas(64) Slot {
  static constexpr uint64_t writing(uint64_t number) { return 2 * number + 1; }
  static constexpr uint64_t written(uint64_t number) { return 2 * number + 2; }

  std::atomic<uint64_t> state{0};  // 0 before the first event.
  std::atomic<int64_t> begin_ns{0};
  std::atomic<int64_t> end_ns{0};
  std::atomic<const TraceLabel*> label{nullptr};
  std::atomic<uint64_t> size_bytes{0};
  std::atomic<uint64_t> first_arguments{0};
  std::atomic<uint64_t> last_argument_and_flow{0};
  std::atomic<uint64_t> place{0};  // Track, kind and the role in the flow.
};
static_assert(sizeof(Slot) == 64, "an event is one cache line");

constexpr uint64_t join(uint32_t high, uint32_t low) {
  return uint64_t{high} << 32U | low;
}

constexpr uint32_t high_of(uint64_t word) {
  return static_cast<uint32_t>(word >> 32U);
}

constexpr uint32_t low_of(uint64_t word) {
  return static_cast<uint32_t>(word);
}

struct Ring {
  explicit Ring(size_t slot_count) : capacity(slot_count), slots(new Slot[slot_count]) {}

  const size_t capacity;  // A power of two.
  const std::unique_ptr<Slot[]> slots;
  std::atomic<uint64_t> next{0};         // Number of the next event.
  std::atomic<uint64_t> lost{0};         // Events that found their slot taken.
  std::atomic<uint64_t> first{0};        // Number of the first event since the last start,
  std::atomic<uint64_t> lost_before{0};  // and what had been lost then.
};

// The ring in use. A thread may write to one that was replaced, so rings are never freed: one of
// each size is kept.
std::atomic<Ring*> g_ring{nullptr};

struct Rings {
  std::mutex mutex;
  std::vector<std::unique_ptr<Ring>> all;  // Guarded by mutex.
};

Rings& rings() {
  // Leaked on purpose: threads may record while static destructors run.
  static auto& known = *new Rings;
  return known;
}

std::atomic<uint32_t> g_flow{0};
thread_local uint32_t t_flow = 0;

void lock_at_fork() {
  rings().mutex.lock();
}

void unlock_at_fork() {
  rings().mutex.unlock();
}

// What the parent recorded is the parent's to write.
void forget_in_child() {
  trace_internal::is_on = false;
  g_ring = nullptr;
  t_flow = 0;
  for (auto& ring : rings().all) static_cast<void>(ring.release());
  rings().all.clear();
  unlock_at_fork();
}

bool read(const Slot& slot, uint64_t number, TraceEvent* event) {
  if (slot.state.load(std::memory_order_acquire) != Slot::written(number)) return false;
  event->begin_ns = slot.begin_ns.load(std::memory_order_acquire);
  event->end_ns = slot.end_ns.load(std::memory_order_acquire);
  event->label = slot.label.load(std::memory_order_acquire);
  event->size_bytes = slot.size_bytes.load(std::memory_order_acquire);
  const uint64_t first_arguments = slot.first_arguments.load(std::memory_order_acquire);
  const uint64_t last_argument = slot.last_argument_and_flow.load(std::memory_order_acquire);
  const uint64_t place = slot.place.load(std::memory_order_acquire);
  event->arguments = {high_of(first_arguments), low_of(first_arguments), high_of(last_argument)};
  event->flow_id = low_of(last_argument);
  event->track = high_of(place);
  event->kind = static_cast<TraceEvent::Kind>(low_of(place) >> 8U);
  event->flow = static_cast<TraceEvent::Flow>(low_of(place) & 0xffU);
  return slot.state.load(std::memory_order_relaxed) == Slot::written(number);
}

}  // namespace

int64_t trace_now_ns() noexcept {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

void trace_record(const TraceEvent& event) noexcept {
  if (!trace_is_on()) return;
  Ring* const ring = g_ring.load(std::memory_order_acquire);
  if (ring == nullptr) return;
  const uint64_t number = ring->next.fetch_add(1, std::memory_order_relaxed);
  Slot& slot = ring->slots[number & (ring->capacity - 1)];
  uint64_t seen = slot.state.load(std::memory_order_relaxed);
  const bool is_being_written = seen % 2 == 1;
  if (is_being_written || seen > Slot::writing(number) ||
      !slot.state.compare_exchange_strong(seen, Slot::writing(number), std::memory_order_acquire)) {
    ring->lost.fetch_add(1, std::memory_order_relaxed);
    return;
  }
  constexpr auto kRelease = std::memory_order_release;
  slot.begin_ns.store(event.begin_ns, kRelease);
  slot.end_ns.store(event.end_ns, kRelease);
  slot.label.store(event.label, kRelease);
  slot.size_bytes.store(event.size_bytes, kRelease);
  slot.first_arguments.store(join(event.arguments[0], event.arguments[1]), kRelease);
  slot.last_argument_and_flow.store(join(event.arguments[2], event.flow_id), kRelease);
  slot.place.store(join(event.track, static_cast<uint32_t>(event.kind) << 8U |
                                         static_cast<uint32_t>(event.flow)),
                   kRelease);
  slot.state.store(Slot::written(number), kRelease);
}

uint32_t next_trace_flow() noexcept {
  const uint32_t number = ++g_flow;
  return number != 0 ? number : ++g_flow;
}

void set_trace_flow(uint32_t flow_id) noexcept {
  t_flow = flow_id;
}

uint32_t trace_flow() noexcept {
  return t_flow;
}

void start_trace(size_t events_max) {
  if (events_max < kTraceEventsMin || events_max > kTraceEventsMax) {
    throw ConfigError("a trace keeps between " + std::to_string(kTraceEventsMin) + " and " +
                      std::to_string(kTraceEventsMax) + " events, not " +
                      std::to_string(events_max));
  }
  static const int watched = pthread_atfork(lock_at_fork, unlock_at_fork, forget_in_child);
  static_cast<void>(watched);
  const size_t capacity = std::bit_ceil(events_max);
  const std::lock_guard lock(rings().mutex);
  if (trace_is_on()) return;
  auto& all = rings().all;
  auto found = std::find_if(all.begin(), all.end(),
                            [&](const auto& ring) { return ring->capacity == capacity; });
  if (found == all.end()) found = all.insert(all.end(), std::make_unique<Ring>(capacity));
  Ring& ring = **found;
  ring.first = ring.next.load();
  ring.lost_before = ring.lost.load();
  g_ring = &ring;
  trace_internal::is_on = true;
}

void stop_trace() noexcept {
  const std::lock_guard lock(rings().mutex);
  trace_internal::is_on = false;
}

TraceContents trace_contents() {
  TraceContents contents;
  Ring* const ring = g_ring.load();
  if (ring == nullptr) return contents;
  const uint64_t end = ring->next.load(std::memory_order_acquire);
  const uint64_t first = ring->first;
  const uint64_t begin = std::max(first, end - std::min<uint64_t>(end, ring->capacity));
  contents.recorded = end - first;
  contents.dropped = begin - first + ring->lost - ring->lost_before;
  contents.events.reserve(end - begin);
  for (uint64_t number = begin; number < end; ++number) {
    TraceEvent event;
    if (read(ring->slots[number & (ring->capacity - 1)], number, &event)) {
      contents.events.push_back(event);
    }
  }
  return contents;
}

}  // namespace spillover
