// What happened on the virtual clock: exact totals for the whole run, and the latest spans, waits
// and memory samples in rings of bounded size, from which the trace and the critical path are made.
//
// Owned by the Clock; guarded by Machine::mutex.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "emulator/core/clock/timeline.hpp"

namespace spillover::emulator {

// A time in which a thread of the host did nothing but wait for the device.
struct HostWait {
  std::uint32_t thread = 0;
  const char* cause = "";  // the call, or "launch queue full"
  Nanoseconds start = 0;
  Nanoseconds end = 0;
  Origin waited_for;
};

struct MemorySample {
  Nanoseconds time = 0;
  int device = 0;
  bool by_allocator = false;  // bytes in blocks of a caching allocator, not of the driver
  std::uint64_t bytes = 0;
};

struct WorkTotal {
  std::uint64_t count = 0;
  std::uint64_t bytes = 0;
  Nanoseconds busy = 0;
};

const char* resource_name(Resource resource);

class Recorder {
 public:
  // From the timeline, in the order of their ends.
  void add(const Span& span);
  void add(const HostWait& wait);
  void add(const MemorySample& sample);

  // When the last span ended.
  Nanoseconds last_end() const { return end_; }

  struct ThreadEntry {
    std::uint32_t id = 0;
    std::string name;
    Nanoseconds now = 0;
  };
  // What only the clock knows at the time of a report.
  struct Facts {
    Nanoseconds makespan = 0;
    std::vector<ThreadEntry> threads;
    std::uint64_t unseen_waits = 0;
    std::string profile;
  };

  // Notes the moment when all of so many submissions have ended and the host has come to now.
  std::int64_t mark(std::uint64_t submissions, Nanoseconds now);
  Nanoseconds mark_time(std::int64_t mark) const;

  // What the time between two moments went by, along the critical path (JSON): the work on each
  // resource, kernels by their limit, and the host. Adds up to the whole time where no span of it
  // was dropped.
  std::string limits(Nanoseconds from, Nanoseconds to) const;

  std::string report(const Facts& facts) const;                  // JSON
  bool write_trace(const char* path, const Facts& facts) const;  // Chrome's format; false: errno

 private:
  struct Share {
    Nanoseconds time = 0;
    std::uint64_t count = 0;
    void add(Nanoseconds more) {
      time += more;
      ++count;
    }
  };
  using Shares = std::map<std::string, Share>;

  struct Mark {
    std::uint64_t submissions = 0;
    Nanoseconds end = 0;  // of what was submitted since the mark before, and the host's time
  };

  void note_gap(const Span& span);
  void note_mark(const Span& span);
  void note_place(const Span& span);
  const Span* find(std::uint64_t number) const;
  // Follows the chain of causes back from the latest end. True when it reached the beginning.
  bool critical_path(Shares* path) const;

  std::string resources_json() const;
  static std::string shares_json(const Shares& shares);
  static std::string memory_json(const std::vector<MemorySample>& samples);

  std::map<std::pair<Resource, int>, WorkTotal> resources_;
  std::map<const char*, WorkTotal> operations_;
  std::map<std::pair<Resource, int>, Nanoseconds> last_end_;
  Shares stalls_;
  Shares waits_;
  std::map<std::pair<int, bool>, MemorySample> memory_peaks_;
  Nanoseconds end_ = 0;
  std::vector<Mark> marks_;  // in the order of their submissions

  // Spans are numbered by their starts and kept by their ends: places_[number - first_place_] is
  // how many had ended before the one with that number.
  static constexpr std::uint64_t kNoPlace = ~std::uint64_t{0};  // has not ended
  std::deque<std::uint64_t> places_;
  std::uint64_t first_place_ = 0;

  std::deque<Span> spans_;
  std::deque<HostWait> host_waits_;
  std::deque<MemorySample> memory_;
  std::uint64_t spans_dropped_ = 0;
  std::uint64_t waits_dropped_ = 0;
  std::uint64_t samples_dropped_ = 0;
};

}  // namespace spillover::emulator
