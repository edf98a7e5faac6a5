#include "trace/chrome_trace.hpp"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cinttypes>
#include <cstdio>
#include <ctime>
#include <map>
#include <string_view>
#include <vector>

#include "trace/recorder.hpp"

namespace spillover {
namespace {

// See Note [One time with torch.profiler].
constexpr int64_t kNanoseconds = 1'000'000'000;
constexpr int64_t kQuarterSeconds = 7'889'238;

// Rows of ours; above what the system numbers threads with.
constexpr int64_t kFirstRow = 10'000'000;

int64_t unix_now_ns() {
  timespec now{};
  clock_gettime(CLOCK_REALTIME, &now);
  return int64_t{now.tv_sec} * kNanoseconds + now.tv_nsec;
}

// What to add to CLOCK_MONOTONIC for Unix time: of some tries the one that took the least.
int64_t unix_offset_ns() {
  int64_t best_ns = INT64_MAX;
  int64_t offset_ns = 0;
  for (int i = 0; i < 8; ++i) {
    const int64_t before_ns = trace_now_ns();
    const int64_t unix_ns = unix_now_ns();
    const int64_t took_ns = trace_now_ns() - before_ns;
    if (took_ns >= best_ns) continue;
    best_ns = took_ns;
    offset_ns = unix_ns - before_ns - took_ns / 2;
  }
  return offset_ns;
}

// Builds the text. Names come from anywhere; numbers are ours.
class Json {
 public:
  void append(std::string_view text) { text_ += text; }

  void string(std::string_view value) {
    text_ += '"';
    for (const char character : value) {
      if (character == '"' || character == '\\') {
        text_ += '\\';
        text_ += character;
      } else if (static_cast<unsigned char>(character) < 0x20) {
        format("\\u%04x", static_cast<unsigned>(character));
      } else {
        text_ += character;
      }
    }
    text_ += '"';
  }

  template <class... Values>
  void format(const char* pattern, Values... values) {
    std::array<char, 512> buffer{};
    const int length = std::snprintf(buffer.data(), buffer.size(), pattern, values...);
    text_.append(buffer.data(), static_cast<size_t>(length));
  }

  // Microseconds with their nanoseconds; never below 0 where it is a time.
  void microseconds(int64_t nanoseconds) {
    const char* const sign = nanoseconds < 0 ? "-" : "";
    const int64_t value = nanoseconds < 0 ? -nanoseconds : nanoseconds;
    format("%s%" PRId64 ".%03" PRId64, sign, value / 1000, value % 1000);
  }

  std::string take() { return std::move(text_); }

 private:
  std::string text_;
};

class Writer {
 public:
  Writer(const ChromeTraceOptions& options, const TraceContents& contents)
      : options_(options),
        contents_(contents),
        dropped_count_(contents.dropped),
        tracks_(trace_tracks()),
        process_(getpid()),
        offset_ns_(unix_offset_ns()),
        base_ns_((unix_now_ns() / kNanoseconds) / kQuarterSeconds * kQuarterSeconds *
                 kNanoseconds) {
    // Where there is something from before the time that is asked for, all of that is there.
    const auto& events = contents.events;
    if (!events.empty() && events.front().end_ns < options.from_ns) dropped_count_ = 0;
  }

  ChromeTrace write() {
    json_.format(
        "{\"schemaVersion\": 1, \"displayTimeUnit\": \"ms\", \"baseTimeNanoseconds\": "
        "%" PRId64 ", \"spillover\": {\"recorded\": %" PRIu64 ", \"dropped\": %" PRIu64
        "}, \"traceEvents\": [\n",
        base_ns_, contents_.recorded, dropped_count_);
    name_process();
    std::map<TraceTrack, std::vector<const TraceEvent*>> by_track;
    for (const TraceEvent& event : contents_.events) {
      if (event.begin_ns <= options_.until_ns && event.end_ns >= options_.from_ns) {
        by_track[event.track].push_back(&event);
      }
    }
    for (auto& [track, events] : by_track) write_track(tracks_.at(track), events);
    json_.append("\n]}\n");
    return {json_.take(), event_count_, dropped_count_};
  }

 private:
  void name_process() {
    json_.format(
        "{\"ph\": \"M\", \"name\": \"process_name\", \"pid\": %d, \"tid\": 0, \"args\": "
        "{\"name\": ",
        process_);
    json_.string(options_.process_name);
    json_.append("}}");
  }

  void write_track(const TrackInfo& track, std::vector<const TraceEvent*>& events) {
    const auto spans = std::stable_partition(events.begin(), events.end(), [](const auto* event) {
      return event->kind == TraceEvent::Kind::kCounter;
    });
    for (auto event = events.begin(); event != spans; ++event) write_counter(track, **event);
    events.erase(events.begin(), spans);
    if (events.empty()) return;
    std::stable_sort(events.begin(), events.end(), [](const TraceEvent* a, const TraceEvent* b) {
      // What contains another comes before it.
      return a->begin_ns != b->begin_ns ? a->begin_ns < b->begin_ns : a->end_ns > b->end_ns;
    });
    if (track.kind == TrackKind::kThread) {
      const std::string name = track.name + " " + std::to_string(track.thread_id) + " (spillover)";
      const int64_t row = open_row(name);
      for (const TraceEvent* event : events) write_span(row, *event);
      return;
    }
    write_lanes(track, events);
  }

  // See Note [Lanes].
  void write_lanes(const TrackInfo& track, const std::vector<const TraceEvent*>& events) {
    struct Lane {
      int64_t row;
      int64_t end_ns;
    };
    std::vector<Lane> lanes;
    for (const TraceEvent* event : events) {
      auto lane = std::find_if(lanes.begin(), lanes.end(),
                               [&](const Lane& one) { return one.end_ns <= event->begin_ns; });
      if (lane == lanes.end()) {
        const std::string number = lanes.empty() ? "" : " #" + std::to_string(lanes.size() + 1);
        lane = lanes.insert(lanes.end(), {open_row(track.name + number), 0});
      }
      lane->end_ns = event->end_ns;
      write_span(lane->row, *event);
    }
  }

  int64_t open_row(const std::string& name) {
    const int64_t row = next_row_++;
    json_.format(",\n{\"ph\": \"M\", \"name\": \"thread_name\", \"pid\": %d, \"tid\": %" PRId64
                 ", \"args\": {\"name\": ",
                 process_, row);
    json_.string(name);
    json_.format(
        "}},\n{\"ph\": \"M\", \"name\": \"thread_sort_index\", \"pid\": %d, \"tid\": "
        "%" PRId64 ", \"args\": {\"sort_index\": %" PRId64 "}}",
        process_, row, row);
    return row;
  }

  void begin_event(const char* phase, std::string_view name, const char* category,
                   int64_t time_ns) {
    json_.format(",\n{\"ph\": \"%s\", \"name\": ", phase);
    json_.string(name);
    json_.append(", \"cat\": ");
    json_.string(category);
    json_.append(", \"ts\": ");
    json_.microseconds(time_ns + offset_ns_ - base_ns_);
    json_.format(", \"pid\": %d", process_);
  }

  void write_span(int64_t row, const TraceEvent& event) {
    ++event_count_;
    begin_event("X", event.label->name, event.label->category, event.begin_ns);
    json_.format(", \"tid\": %" PRId64 ", \"dur\": ", row);
    json_.microseconds(event.end_ns - event.begin_ns);
    write_arguments(event);
    json_.append("}");
    if (event.flow == TraceEvent::Flow::kNone) return;
    const bool begins = event.flow == TraceEvent::Flow::kBegins;
    begin_event(begins ? "s" : "f", "bytes", "flow", event.begin_ns);
    json_.format(", \"tid\": %" PRId64 ", \"id\": %" PRIu32 "%s}", row, event.flow_id,
                 begins ? "" : ", \"bp\": \"e\"");
  }

  void write_arguments(const TraceEvent& event) {
    bool is_first = true;
    const auto add = [&](const char* name, uint64_t value) {
      json_.append(is_first ? ", \"args\": {" : ", ");
      json_.string(name);
      json_.format(": %" PRIu64, value);
      is_first = false;
    };
    if (event.size_bytes != 0) add("bytes", event.size_bytes);
    for (size_t i = 0; i < event.arguments.size(); ++i) {
      if (event.label->arguments[i] != nullptr) add(event.label->arguments[i], event.arguments[i]);
    }
    if (!is_first) json_.append("}");
  }

  void write_counter(const TrackInfo& track, const TraceEvent& event) {
    ++event_count_;
    begin_event("C", track.name, event.label->category, event.begin_ns);
    json_.append(", \"tid\": 0, \"args\": {");
    json_.string(event.label->name);
    json_.format(": %" PRIu64 "}}", event.size_bytes);
  }

  const ChromeTraceOptions& options_;
  const TraceContents& contents_;
  uint64_t dropped_count_;
  const std::vector<TrackInfo> tracks_;
  const int process_;
  const int64_t offset_ns_;
  const int64_t base_ns_;
  Json json_;
  int64_t next_row_ = kFirstRow;
  uint64_t event_count_ = 0;
};

}  // namespace

ChromeTrace chrome_trace(const ChromeTraceOptions& options) {
  const TraceContents contents = trace_contents();
  return Writer(options, contents).write();
}

}  // namespace spillover
