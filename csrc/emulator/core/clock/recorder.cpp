#include "emulator/core/clock/recorder.hpp"

#include <algorithm>

namespace spillover::emulator {
namespace {

// About 40 MB of spans. A longer run keeps its latest ones; totals stay exact.
constexpr std::size_t kSpansMax = std::size_t{1} << 18;
constexpr std::size_t kWaitsMax = std::size_t{1} << 16;
constexpr std::size_t kSamplesMax = std::size_t{1} << 16;

template <typename Item>
void push(std::deque<Item>* ring, const Item& item, std::size_t capacity, std::uint64_t* dropped) {
  if (ring->size() == capacity) {
    ring->pop_front();
    ++*dropped;
  }
  ring->push_back(item);
}

// Why a kernel started later than the one before it ended.
std::string gap_cause(const Span& span) {
  if (span.cause.span == Origin::kNoSpan) return "kernels were not launched yet";
  const std::string by = resource_name(span.cause.resource);
  if (span.by_event) return "waiting for " + by;
  return span.cause.resource == Resource::kCompute ? "between kernels" : "behind " + by;
}

}  // namespace

const char* resource_name(Resource resource) {
  switch (resource) {
    case Resource::kNone:
      return "none";
    case Resource::kCompute:
      return "compute";
    case Resource::kCopyIn:
      return "copy-in";
    case Resource::kCopyOut:
      return "copy-out";
    case Resource::kPeerLink:
      return "peer-link";
    case Resource::kHostFunction:
      return "host-function";
    case Resource::kOptimizer:
      return "cpu-optimizer";
    case Resource::kHostOperator:
      return "cpu-operators";
    case Resource::kDiskRead:
      return "disk-read";
    case Resource::kDiskWrite:
      return "disk-write";
  }
  return "none";
}

void Recorder::note_gap(const Span& span) {
  Nanoseconds& last = last_end_[{span.resource, span.device}];
  if (span.resource == Resource::kCompute && span.start > last) {
    const Nanoseconds gap = span.start - last;
    // Of a gap that the host made, the part in which it waited is no launch overhead.
    Nanoseconds waited = 0;
    if (span.cause.span == Origin::kNoSpan && span.host.resumed > last) {
      waited = std::min(span.host.resumed, span.start) - last;
      stalls_["kernels were not launched: the host waited"].add(waited);
    }
    if (gap > waited) stalls_[gap_cause(span)].add(gap - waited);
  }
  last = std::max(last, span.end);
}

void Recorder::add(const Span& span) {
  const auto count = [&](WorkTotal* total) {
    ++total->count;
    total->bytes += span.bytes;
    total->busy += span.end - span.start;
  };
  end_ = std::max(end_, span.end);
  count(&resources_[{span.resource, span.device}]);
  count(&operations_[span.name]);
  note_gap(span);
  note_mark(span);
  note_place(span);
  push(&spans_, span, kSpansMax, &spans_dropped_);
  while (places_.front() < spans_dropped_) {
    places_.pop_front();
    ++first_place_;
  }
}

void Recorder::add(const HostWait& wait) {
  if (wait.end <= wait.start) return;
  waits_[wait.cause].add(wait.end - wait.start);
  push(&host_waits_, wait, kWaitsMax, &waits_dropped_);
}

void Recorder::add(const MemorySample& sample) {
  MemorySample& peak = memory_peaks_[{sample.device, sample.by_allocator}];
  if (sample.bytes > peak.bytes) peak = sample;
  push(&memory_, sample, kSamplesMax, &samples_dropped_);
}

void Recorder::note_place(const Span& span) {
  while (first_place_ + places_.size() <= span.number) places_.push_back(kNoPlace);
  places_[span.number - first_place_] = spans_dropped_ + spans_.size();
}

const Span* Recorder::find(std::uint64_t number) const {
  if (number < first_place_ || number - first_place_ >= places_.size()) return nullptr;
  const std::uint64_t place = places_[number - first_place_];
  if (place == kNoPlace || place < spans_dropped_) return nullptr;
  return &spans_[place - spans_dropped_];
}

bool Recorder::critical_path(Shares* path) const {
  const auto latest = std::max_element(spans_.begin(), spans_.end(),
                                       [](const Span& a, const Span& b) { return a.end < b.end; });
  const Span* span = latest == spans_.end() ? nullptr : &*latest;
  const auto add = [&](const std::string& name, Nanoseconds time) {
    if (time > 0) (*path)[name].add(time);
  };
  while (span != nullptr) {
    add(span->name, span->end - span->start);
    const bool by_host = span->cause.span == Origin::kNoSpan;
    const Origin origin = by_host ? span->host.waited_for : span->cause;
    if (origin.span == Origin::kNoSpan) {
      add(by_host ? "host: Python and launches" : "device: idle", span->start);
      return true;
    }
    const Span* const before = find(origin.span);
    if (before == nullptr) return false;
    add(by_host ? "host: Python and launches" : "between operations", span->start - before->end);
    span = before;
  }
  return spans_dropped_ == 0;
}

}  // namespace spillover::emulator
