// The rows of a trace: threads, copy streams, folders and counters, by number.
//
// Thread-safe. A track is never forgotten, so there are at most kTracksMax; what comes after shares
// the last one. A thread's own track is looked up once a thread, and under a mutex then.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace spillover {

using TraceTrack = uint32_t;

inline constexpr size_t kTracksMax = 4096;

enum class TrackKind : uint8_t {
  kThread,   // Spans nest, as calls do.
  kLanes,    // Spans may overlap; the export puts them side by side.
  kCounter,  // Values.
};

struct TrackInfo {
  TrackKind kind;
  std::string name;
  int64_t thread_id;  // The system's, of a thread; else 0.
};

// The track of that kind and name, made where there is none yet.
TraceTrack trace_track(TrackKind kind, const std::string& name);

// The calling thread's.
TraceTrack thread_track() noexcept;

// A track that is made when something is first recorded there. Thread-safe.
class LazyTrack {
 public:
  LazyTrack(TrackKind kind, std::string name) : kind_(kind), name_(std::move(name)) {}

  TraceTrack get() noexcept;

 private:
  static constexpr TraceTrack kNone = UINT32_MAX;

  const TrackKind kind_;
  const std::string name_;
  std::atomic<TraceTrack> track_{kNone};
};

// All so far; the index is the track's number.
std::vector<TrackInfo> trace_tracks();

}  // namespace spillover
