// What time went by: moments of the program, and the critical path between two of them by cause.
#include <algorithm>

#include "emulator/core/clock/recorder.hpp"

namespace spillover::emulator {
namespace {

// What would have to be faster for the span to end earlier.
const char* limit_of(const Span& span) {
  switch (span.resource) {
    case Resource::kNone:
      return "nothing";
    case Resource::kCompute:
      if (span.limit == KernelLimit::kMath) return "compute";
      return span.limit == KernelLimit::kMemory ? "memory bandwidth" : "small kernels";
    case Resource::kCopyIn:
      return "copies to the device";
    case Resource::kCopyOut:
      return "copies to the host";
    case Resource::kPeerLink:
      return "copies between devices";
    case Resource::kHostFunction:
      return "host functions";
    case Resource::kOptimizer:
      return "CPU optimizer";
    case Resource::kHostOperator:
      return "CPU operators";
    case Resource::kDiskRead:
      return "disk reads";
    case Resource::kDiskWrite:
      return "disk writes";
  }
  return "nothing";
}

constexpr const char* kHostWork = "host: Python and launches";

}  // namespace

std::int64_t Recorder::mark(std::uint64_t submissions, Nanoseconds now) {
  marks_.push_back({submissions, now});
  return static_cast<std::int64_t>(marks_.size()) - 1;
}

void Recorder::note_mark(const Span& span) {
  const auto found = std::lower_bound(
      marks_.begin(), marks_.end(), span.submission,
      [](const Mark& mark, std::uint64_t submission) { return mark.submissions < submission; });
  if (found != marks_.end()) found->end = std::max(found->end, span.end);
}

Nanoseconds Recorder::mark_time(std::int64_t mark) const {
  Nanoseconds time = 0;
  for (std::int64_t i = 0; i <= mark && i < static_cast<std::int64_t>(marks_.size()); ++i) {
    time = std::max(time, marks_[static_cast<std::size_t>(i)].end);
  }
  return time;
}

std::string Recorder::limits(Nanoseconds from, Nanoseconds to) const {
  Shares shares;
  Nanoseconds reached = to;
  // The time since begin that has not been given to a cause yet.
  const auto add = [&](const char* cause, Nanoseconds begin) {
    const Nanoseconds start = std::max(begin, from);
    if (start < reached) shares[cause].add(reached - start);
    reached = std::min(reached, start);
  };
  const auto behind =
      std::upper_bound(spans_.begin(), spans_.end(), to,
                       [](Nanoseconds time, const Span& span) { return time < span.end; });
  const Span* span = behind == spans_.begin() ? nullptr : &*std::prev(behind);
  bool by_host = true;
  while (span != nullptr && reached > from) {
    add(by_host ? kHostWork : "gaps between kernels", span->end);
    add(limit_of(*span), span->start);
    by_host = span->cause.span == Origin::kNoSpan;
    const Origin origin = by_host ? span->host.waited_for : span->cause;
    if (origin.span == Origin::kNoSpan) break;
    span = find(origin.span);
    if (span == nullptr) return shares_json(shares);  // it was dropped
  }
  add(kHostWork, from);
  return shares_json(shares);
}

}  // namespace spillover::emulator
