#include "tiers/folder_counters.hpp"

#include <algorithm>

#include "trace/recorder.hpp"
#include "trace/span.hpp"

namespace spillover {
namespace {

constexpr std::array<const char*, 3> kArguments{"gate_us", "queued_us", "checksum_us"};
constexpr TraceLabel kWrite{"write", "disk", kArguments};
constexpr TraceLabel kFailedWrite{"write (failed)", "disk", kArguments};
constexpr TraceLabel kRead{"read", "disk", kArguments};
constexpr TraceLabel kFailedRead{"read (failed)", "disk", kArguments};
constexpr TraceLabel kExtents{"extents", "disk"};

const TraceLabel& label_of(TransferDirection direction, bool has_failed) {
  if (direction == TransferDirection::kWrite) return has_failed ? kFailedWrite : kWrite;
  return has_failed ? kFailedRead : kRead;
}

uint32_t whole_microseconds(int64_t nanoseconds) {
  return static_cast<uint32_t>(std::clamp<int64_t>(nanoseconds / 1000, 0, UINT32_MAX));
}

double seconds(int64_t nanoseconds) {
  return static_cast<double>(nanoseconds) / 1e9;
}

}  // namespace

FolderCounters::FolderCounters(const std::string& folder)
    : directions_{{{{TrackKind::kLanes, "disk write " + folder},
                    {TrackKind::kCounter, "disk write queue " + folder}},
                   {{TrackKind::kLanes, "disk read " + folder},
                    {TrackKind::kCounter, "disk read queue " + folder}}}} {}

void FolderCounters::begin(TransferDirection direction, const ExtentNotes& notes) noexcept {
  Direction& one = directions_[index_of(direction)];
  {
    const std::lock_guard lock(mutex_);
    ++one.queue_depth;
    one.queue_depth_max = std::max(one.queue_depth_max, one.queue_depth);
    if (one.queue_depth == 1) one.busy_since_ns = notes.submitted_ns;
    if (trace_is_on()) trace_counter(kExtents, one.depth.get(), one.queue_depth);
  }
}

void FolderCounters::add_submitting(TransferDirection direction, int64_t nanoseconds) noexcept {
  const std::lock_guard lock(mutex_);
  directions_[index_of(direction)].submitting_ns += nanoseconds;
}

void FolderCounters::end(TransferDirection direction, const ExtentNotes& notes, size_t size_bytes,
                         bool has_failed) noexcept {
  Direction& one = directions_[index_of(direction)];
  const int64_t end_ns = trace_now_ns();
  // One that the engine never began was in its queue to the end.
  const int64_t begun_ns = notes.begun_ns != 0 ? notes.begun_ns : end_ns;
  {
    const std::lock_guard lock(mutex_);
    --one.queue_depth;
    if (one.queue_depth == 0) one.busy_ns += std::max<int64_t>(end_ns - one.busy_since_ns, 0);
    ++one.extents;
    one.errors += has_failed ? 1 : 0;
    one.bytes += has_failed ? 0 : size_bytes;
    one.resubmits += notes.resubmits;
    one.queued_ns += begun_ns - notes.submitted_ns;
    one.moving_ns += end_ns - begun_ns;
    one.checksum_ns += notes.checksum_ns;
    if (trace_is_on()) trace_counter(kExtents, one.depth.get(), one.queue_depth);
  }
  if (!trace_is_on()) return;
  TraceEvent event;
  event.label = &label_of(direction, has_failed);
  event.track = one.spans.get();
  event.begin_ns = begun_ns;
  event.end_ns = end_ns;
  event.size_bytes = size_bytes;
  event.arguments = {whole_microseconds(notes.submitted_ns - notes.requested_ns),
                     whole_microseconds(begun_ns - notes.submitted_ns),
                     whole_microseconds(notes.checksum_ns)};
  event.flow_id = notes.flow_id;
  if (event.flow_id != 0) event.flow = TraceEvent::Flow::kEnds;
  trace_record(event);
}

DiskDirectionStats FolderCounters::stats(TransferDirection direction) const {
  const Direction& one = directions_[index_of(direction)];
  const std::lock_guard lock(mutex_);
  const int64_t since_ns =
      one.queue_depth == 0 ? 0 : std::max<int64_t>(trace_now_ns() - one.busy_since_ns, 0);
  return {one.bytes,
          one.extents,
          one.errors,
          one.resubmits,
          one.queue_depth,
          one.queue_depth_max,
          seconds(one.busy_ns + since_ns),
          seconds(one.queued_ns),
          seconds(one.moving_ns),
          seconds(one.checksum_ns),
          seconds(one.submitting_ns)};
}

}  // namespace spillover
