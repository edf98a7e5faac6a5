// A span from construction to destruction, of the calling thread or on a track of its own, and the
// value of a counter.
//
// Values of one thread. They nest as blocks do.
#pragma once

#include <cstddef>
#include <cstdint>

#include "trace/recorder.hpp"
#include "trace/tracks.hpp"

namespace spillover {

class TraceSpan {
 public:
  // label lives as long as the process.
  explicit TraceSpan(const TraceLabel& label, uint64_t size_bytes = 0) noexcept
      : TraceSpan(label, nullptr, size_bytes) {}
  // The track outlives the span.
  TraceSpan(const TraceLabel& label, LazyTrack& track, uint64_t size_bytes = 0) noexcept
      : TraceSpan(label, &track, size_bytes) {}
  ~TraceSpan() {
    if (label_ == nullptr) return;
    TraceEvent event;
    event.label = label_;
    event.track = track_ == nullptr ? thread_track() : track_->get();
    event.begin_ns = begin_ns_;
    event.end_ns = trace_now_ns();
    event.size_bytes = size_bytes_;
    trace_record(event);
  }
  TraceSpan(const TraceSpan&) = delete;
  TraceSpan& operator=(const TraceSpan&) = delete;

 private:
  TraceSpan(const TraceLabel& label, LazyTrack* track, uint64_t size_bytes) noexcept
      : label_(trace_is_on() ? &label : nullptr), track_(track), size_bytes_(size_bytes) {
    if (label_ != nullptr) begin_ns_ = trace_now_ns();
  }

  const TraceLabel* const label_;
  LazyTrack* const track_;
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
