// A span of the calling thread, from construction to destruction, and the value of a counter.
//
// Values of one thread. They nest as blocks do.
#pragma once

#include <cstddef>
#include <cstdint>

#include "trace/recorder.hpp"

namespace spillover {

class TraceSpan {
 public:
  // label lives as long as the process.
  explicit TraceSpan(const TraceLabel& label, uint64_t size_bytes = 0) noexcept
      : label_(trace_is_on() ? &label : nullptr), size_bytes_(size_bytes) {
    if (label_ != nullptr) begin_ns_ = trace_now_ns();
  }
  ~TraceSpan() {
    if (label_ == nullptr) return;
    TraceEvent event;
    event.label = label_;
    event.track = thread_track();
    event.begin_ns = begin_ns_;
    event.end_ns = trace_now_ns();
    event.size_bytes = size_bytes_;
    trace_record(event);
  }
  TraceSpan(const TraceSpan&) = delete;
  TraceSpan& operator=(const TraceSpan&) = delete;

 private:
  const TraceLabel* const label_;
  const uint64_t size_bytes_;
  int64_t begin_ns_ = 0;
};

// label names the series within the track.
inline void trace_counter(const TraceLabel& label, TraceTrack track, uint64_t value) noexcept {
  if (!trace_is_on()) return;
  TraceEvent event;
  event.label = &label;
  event.track = track;
  event.kind = TraceEvent::Kind::kCounter;
  event.begin_ns = event.end_ns = trace_now_ns();
  event.size_bytes = value;
  trace_record(event);
}

}  // namespace spillover
