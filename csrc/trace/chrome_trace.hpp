// Writes what was recorded as a Chrome trace: JSON that Perfetto and chrome://tracing open.
//
// Note [One time with torch.profiler]. Chrome's format has microseconds from any beginning.
// PyTorch's profiler writes Unix time less `baseTimeNanoseconds`, a whole number of quarters of a
// mean year, so that a double has nanoseconds. We do the same, with the difference between
// CLOCK_MONOTONIC and Unix time at the moment of writing: only setting the clock changes it. So
// events of both files have one time, and can be put into one file.
//
// Note [Lanes]. The format takes spans of one row only where they nest; Perfetto drops others. What
// a stream or a folder has under way overlaps, so its spans are laid side by side in as few rows as
// they need. A thread's spans nest already, and get a row of their own rather than the system's
// thread: two clocks that differ by a microsecond would break the nesting with torch's spans there.
//
// Thread-safe.
#pragma once

#include <cstdint>
#include <string>

namespace spillover {

struct ChromeTraceOptions {
  // CLOCK_MONOTONIC. Spans that lie in this time as a whole or in part, and counters.
  int64_t from_ns = INT64_MIN;
  int64_t until_ns = INT64_MAX;
  std::string process_name;
};

struct ChromeTrace {
  std::string json;
  uint64_t event_count;    // Spans and counters written.
  uint64_t dropped_count;  // Recorded since the start, and gone; 0 where none of the time that is
                           // asked for are.
};

// Throws std::bad_alloc.
ChromeTrace chrome_trace(const ChromeTraceOptions& options);

}  // namespace spillover
