// The recorder's two forms of output: a report and a trace, both JSON.
#include <cstdarg>
#include <cstdio>
#include <set>

#include "emulator/core/clock/recorder.hpp"

namespace spillover::emulator {
namespace {

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char letter : text) {
    if (letter == '"' || letter == '\\') {
      result += '\\';
      result += letter;
    } else if (static_cast<unsigned char>(letter) < 0x20) {
      result += ' ';
    } else {
      result += letter;
    }
  }
  return result + '"';
}

std::string number(std::uint64_t value) {
  return std::to_string(value);
}
std::string number(Nanoseconds value) {
  return std::to_string(value);
}

// A JSON object or array that is put together piece by piece.
class Json {
 public:
  explicit Json(char open) : text_(1, open), close_(open == '{' ? '}' : ']') {}

  Json& field(const char* name, const std::string& value) {
    separate();
    text_ += quoted(name) + ":" + value;
    return *this;
  }
  Json& item(const std::string& value) {
    separate();
    text_ += value;
    return *this;
  }
  std::string done() { return text_ + close_; }

 private:
  void separate() {
    if (text_.size() > 1) text_ += ',';
  }

  std::string text_;
  char close_;
};

// Writes events of a trace one by one, and remembers whether one could not be written.
class TraceFile {
 public:
  explicit TraceFile(std::FILE* file) : file_(file) { std::fputs("{\"traceEvents\":[\n", file_); }

  void event(const char* format, ...) __attribute__((format(printf, 2, 3))) {
    if (!first_) std::fputs(",\n", file_);
    first_ = false;
    std::va_list arguments;
    va_start(arguments, format);
    std::vfprintf(file_, format, arguments);
    va_end(arguments);
  }

  void name(int process, unsigned long long thread, const std::string& text) {
    event("{\"ph\":\"M\",\"pid\":%d,\"tid\":%llu,\"name\":\"thread_name\",\"args\":{\"name\":%s}}",
          process, thread, quoted(text).c_str());
  }

  void process(int id, const char* text) {
    event("{\"ph\":\"M\",\"pid\":%d,\"name\":\"process_name\",\"args\":{\"name\":\"%s\"}}", id,
          text);
  }

 private:
  std::FILE* file_;
  bool first_ = true;
};

// Trace times are microseconds; three decimals are nanoseconds.
struct Microseconds {
  explicit Microseconds(Nanoseconds time)
      : whole(static_cast<long long>(time / 1000)), rest(static_cast<int>(time % 1000)) {}
  long long whole;
  int rest;
};

constexpr int kHostProcess = 1;
constexpr int kStreamProcess = 2;
constexpr int kResourceProcess = 3;

unsigned long long track_of(const Span& span) {
  return static_cast<unsigned long long>(span.resource) * 100 +
         static_cast<unsigned long long>(span.device);
}

void write_span(TraceFile* file, const Span& span, int process, unsigned long long track) {
  const Microseconds start(span.start);
  const Microseconds duration(span.end - span.start);
  file->event(
      "{\"ph\":\"X\",\"pid\":%d,\"tid\":%llu,\"name\":%s,\"ts\":%lld.%03d,\"dur\":%lld.%03d,"
      "\"args\":{\"number\":%llu,\"bytes\":%llu,\"submitted_ns\":%lld,\"resource\":\"%s\"}}",
      process, track, quoted(span.name).c_str(), start.whole, start.rest, duration.whole,
      duration.rest, static_cast<unsigned long long>(span.number),
      static_cast<unsigned long long>(span.bytes), static_cast<long long>(span.submitted),
      resource_name(span.resource));
}

// An arrow from the end of one span to the start of another.
void write_arrow(TraceFile* file, unsigned long long id, const Span& from, int process,
                 unsigned long long track, Nanoseconds to) {
  const Microseconds start(from.end);
  const Microseconds end(to);
  file->event(
      "{\"ph\":\"s\",\"pid\":%d,\"tid\":%llu,\"id\":%llu,\"name\":\"wait\",\"cat\":\"wait\","
      "\"ts\":%lld.%03d}",
      kStreamProcess, static_cast<unsigned long long>(from.lane), id, start.whole, start.rest);
  file->event(
      "{\"ph\":\"f\",\"bp\":\"e\",\"pid\":%d,\"tid\":%llu,\"id\":%llu,\"name\":\"wait\","
      "\"cat\":\"wait\",\"ts\":%lld.%03d}",
      process, track, id, end.whole, end.rest);
}

}  // namespace

std::string Recorder::resources_json() const {
  Json list('[');
  for (const auto& [key, total] : resources_) {
    list.item(Json('{')
                  .field("name", quoted(resource_name(key.first)))
                  .field("device", std::to_string(key.second))
                  .field("busy_ns", number(total.busy))
                  .field("count", number(total.count))
                  .field("bytes", number(total.bytes))
                  .done());
  }
  return list.done();
}

// Times under names; ordered by name, since pointers have no order that repeats.
std::string Recorder::shares_json(const Shares& shares) {
  Json list('[');
  for (const auto& [name, share] : shares) {
    list.item(Json('{')
                  .field("name", quoted(name))
                  .field("ns", number(share.time))
                  .field("count", number(share.count))
                  .done());
  }
  return list.done();
}

std::string Recorder::memory_json(const std::vector<MemorySample>& samples) {
  Json list('[');
  for (const MemorySample& sample : samples) {
    list.item(Json('[')
                  .item(number(sample.time))
                  .item(std::to_string(sample.device))
                  .item(sample.by_allocator ? "true" : "false")
                  .item(number(sample.bytes))
                  .done());
  }
  return list.done();
}

std::string Recorder::report(const Facts& facts) const {
  Shares operations;
  for (const auto& [name, total] : operations_) {
    Share& share = operations[name];
    share.count += total.count;
    share.time += total.busy;
  }
  Shares path;
  const bool is_whole = critical_path(&path);
  std::vector<MemorySample> peaks;
  for (const auto& [key, sample] : memory_peaks_) peaks.push_back(sample);
  Json threads('[');
  for (const ThreadEntry& thread : facts.threads) {
    threads.item(Json('{')
                     .field("id", std::to_string(thread.id))
                     .field("name", quoted(thread.name))
                     .field("now_ns", number(thread.now))
                     .done());
  }
  return Json('{')
      .field("profile", quoted(facts.profile))
      .field("makespan_ns", number(facts.makespan))
      .field("resources", resources_json())
      .field("operations", shares_json(operations))
      .field("host_waits", shares_json(waits_))
      .field("stalls", shares_json(stalls_))
      .field("critical_path", shares_json(path))
      .field("critical_path_is_whole", is_whole ? "true" : "false")
      .field("memory", memory_json({memory_.begin(), memory_.end()}))
      .field("memory_peaks", memory_json(peaks))
      .field("threads", threads.done())
      .field("unseen_waits", number(facts.unseen_waits))
      .field("spans_dropped", number(spans_dropped_))
      .field("waits_dropped", number(waits_dropped_))
      .field("samples_dropped", number(samples_dropped_))
      .done();
}

bool Recorder::write_trace(const char* path, const Facts& facts) const {
  std::FILE* const output = std::fopen(path, "w");
  if (output == nullptr) return false;
  TraceFile file(output);
  file.process(kHostProcess, "host threads");
  file.process(kStreamProcess, "streams");
  file.process(kResourceProcess, "resources");
  for (const ThreadEntry& thread : facts.threads) file.name(kHostProcess, thread.id, thread.name);
  std::set<std::pair<int, unsigned long long>> named;
  unsigned long long arrows = 0;
  for (const Span& span : spans_) {
    const auto lane = static_cast<unsigned long long>(span.lane);
    if (span.lane < kHostLanes && named.emplace(kStreamProcess, lane).second) {
      file.name(kStreamProcess, lane, "stream " + std::to_string(span.lane));
    }
    const std::string device = span.resource >= Resource::kOptimizer
                                   ? std::string()
                                   : " of cuda:" + std::to_string(span.device);
    if (named.emplace(kResourceProcess, track_of(span)).second) {
      file.name(kResourceProcess, track_of(span), resource_name(span.resource) + device);
    }
    if (span.lane < kHostLanes) write_span(&file, span, kStreamProcess, lane);
    write_span(&file, span, kResourceProcess, track_of(span));
    const Span* const before = span.by_event ? find(span.cause.span) : nullptr;
    if (before != nullptr && before->lane < kHostLanes && span.lane < kHostLanes) {
      write_arrow(&file, ++arrows, *before, kStreamProcess, lane, span.start);
    }
  }
  for (const HostWait& wait : host_waits_) {
    const Microseconds start(wait.start);
    const Microseconds duration(wait.end - wait.start);
    file.event(
        "{\"ph\":\"X\",\"pid\":%d,\"tid\":%u,\"name\":%s,\"ts\":%lld.%03d,\"dur\":%lld.%03d}",
        kHostProcess, wait.thread, quoted(wait.cause).c_str(), start.whole, start.rest,
        duration.whole, duration.rest);
    const Span* const before = find(wait.waited_for.span);
    if (before != nullptr && before->lane < kHostLanes) {
      write_arrow(&file, ++arrows, *before, kHostProcess, wait.thread, wait.end);
    }
  }
  for (const MemorySample& sample : memory_) {
    const Microseconds time(sample.time);
    file.event(
        "{\"ph\":\"C\",\"pid\":%d,\"name\":\"cuda:%d %s bytes\",\"ts\":%lld.%03d,"
        "\"args\":{\"bytes\":%llu}}",
        kResourceProcess, sample.device, sample.by_allocator ? "allocated" : "driver", time.whole,
        time.rest, static_cast<unsigned long long>(sample.bytes));
  }
  std::fprintf(output,
               "\n],\"displayTimeUnit\":\"ns\",\"otherData\":{\"time\":\"simulated\","
               "\"profile\":%s,\"spans_dropped\":\"%llu\",\"makespan_ns\":\"%lld\"}}\n",
               quoted(facts.profile).c_str(), static_cast<unsigned long long>(spans_dropped_),
               static_cast<long long>(facts.makespan));
  const bool failed = std::ferror(output) != 0;
  return std::fclose(output) == 0 && !failed;
}

}  // namespace spillover::emulator
