// Records what happens when: spans and counters, in a ring that keeps the latest.
//
// Note [Tracing]. While nobody records, a place that could costs one relaxed load. While somebody
// does, an event costs one atomic addition and the stores of one cache line, and a span the two
// questions for the time; no lock, no allocation. The ring has a fixed number of slots, each with
// the number of the event that it holds: who writes takes the next number, and with it the slot of
// the oldest event. A slot whose writer was overtaken by a whole lap is left to it, and the event
// that wanted it is counted as lost. So readers and writers never wait, and a reader knows from the
// number whether what it read is one event. There is one ring for all threads rather than one each:
// what is dropped is then the oldest of all, memory does not grow with threads, and events are far
// too few (one for some hundred microseconds of copying) for the addition to be contended.
//
// Times are nanoseconds of CLOCK_MONOTONIC, which Python's time.monotonic_ns() reads as well.
//
// Everything may be called from any thread, and in a forked child, which records nothing before
// somebody starts to there. Nothing throws but what says so.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "trace/tracks.hpp"

namespace spillover {

// What an event is called. Labels live as long as the process: constants, or interned names.
struct TraceLabel {
  const char* name;
  const char* category;
  // What the numbers of its events mean; null for one that it does not use.
  std::array<const char*, 3> arguments{};
};

// One event, as it is recorded and read back.
struct TraceEvent {
  enum class Kind : uint8_t {
    kSpan,     // From begin_ns to end_ns, of size_bytes.
    kCounter,  // size_bytes is its value from begin_ns on.
  };
  enum class Flow : uint8_t { kNone, kBegins, kEnds };

  const TraceLabel* label = nullptr;
  TraceTrack track = 0;
  Kind kind = Kind::kSpan;
  Flow flow = Flow::kNone;  // What this span is to the arrow with the number flow_id.
  int64_t begin_ns = 0;
  int64_t end_ns = 0;
  uint64_t size_bytes = 0;
  std::array<uint32_t, 3> arguments{};
  uint32_t flow_id = 0;
};

namespace trace_internal {
extern std::atomic<bool> is_on;
}

inline bool trace_is_on() noexcept {
  return trace_internal::is_on.load(std::memory_order_relaxed);
}

int64_t trace_now_ns() noexcept;

// Nothing while tracing is off.
void trace_record(const TraceEvent& event) noexcept;

// A number for an arrow from one span to another; never 0.
uint32_t next_trace_flow() noexcept;

// The arrow that what this thread starts next on another track comes from; 0 for none.
void set_trace_flow(uint32_t flow_id) noexcept;
uint32_t trace_flow() noexcept;

inline constexpr size_t kTraceEventsMin = 16;
inline constexpr size_t kTraceEventsMax = size_t{1} << 26;

// Starts to record, in a ring for the latest events_max events, rounded up to a power of two. What
// was recorded before is gone, unless tracing is on: then nothing changes. Throws std::bad_alloc,
// and ConfigError outside of the bounds above.
void start_trace(size_t events_max);

// What was recorded can still be read.
void stop_trace() noexcept;

struct TraceContents {
  std::vector<TraceEvent> events;  // In the order in which they were recorded, spans at their ends.
  uint64_t recorded = 0;           // Since start_trace().
  uint64_t dropped = 0;            // Of them: overwritten by later ones, or lost.
};

// May be called while others record. Throws std::bad_alloc.
TraceContents trace_contents();

}  // namespace spillover
