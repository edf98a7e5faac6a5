#include "trace/tracks.hpp"

#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <mutex>

namespace spillover {
namespace {

struct Tracks {
  std::mutex mutex;
  std::vector<TrackInfo> all;  // Guarded by mutex.
};

Tracks& tracks() {
  // Leaked on purpose: threads may record while static destructors run.
  static auto& known = *new Tracks;
  return known;
}

void lock_at_fork() {
  tracks().mutex.lock();
}

void unlock_at_fork() {
  tracks().mutex.unlock();
}

// How often this process is a fork's child: a thread is another one after it.
std::atomic<uint32_t> g_forks{0};

void unlock_in_child() {
  ++g_forks;
  unlock_at_fork();
}

struct ThreadTrack {
  uint32_t forks = UINT32_MAX;
  TraceTrack track = 0;
};
thread_local ThreadTrack t_track;

// The caller holds the mutex.
TraceTrack add(TrackInfo info) {
  std::vector<TrackInfo>& all = tracks().all;
  if (all.size() == kTracksMax) return kTracksMax - 1;
  if (all.size() == kTracksMax - 1) info = {TrackKind::kLanes, "others", 0};
  all.push_back(std::move(info));
  return static_cast<TraceTrack>(all.size() - 1);
}

void watch_forks() {
  static const int watched = pthread_atfork(lock_at_fork, unlock_at_fork, unlock_in_child);
  static_cast<void>(watched);
}

}  // namespace

TraceTrack trace_track(TrackKind kind, const std::string& name) {
  watch_forks();
  const std::lock_guard lock(tracks().mutex);
  const std::vector<TrackInfo>& all = tracks().all;
  const auto found = std::find_if(all.begin(), all.end(), [&](const TrackInfo& track) {
    return track.kind == kind && track.name == name;
  });
  if (found != all.end()) return static_cast<TraceTrack>(found - all.begin());
  return add({kind, name, 0});
}

TraceTrack thread_track() noexcept {
  const uint32_t forks = g_forks.load(std::memory_order_relaxed);
  if (t_track.forks == forks) [[likely]]
    return t_track.track;
  watch_forks();
  std::array<char, 16> name{};
  pthread_getname_np(pthread_self(), name.data(), name.size());
  try {
    const std::lock_guard lock(tracks().mutex);
    t_track = {forks, add({TrackKind::kThread, name.data(), syscall(SYS_gettid)})};
  } catch (...) {
    return 0;  // No memory for a name: this event goes to some track.
  }
  return t_track.track;
}

TraceTrack LazyTrack::get() noexcept {
  TraceTrack track = track_.load(std::memory_order_relaxed);
  if (track != kNone) return track;
  try {
    track = trace_track(kind_, name_);
  } catch (...) {
    return 0;  // No memory for a name: this event goes to some track.
  }
  track_.store(track, std::memory_order_relaxed);
  return track;
}

std::vector<TrackInfo> trace_tracks() {
  const std::lock_guard lock(tracks().mutex);
  return tracks().all;
}

}  // namespace spillover
