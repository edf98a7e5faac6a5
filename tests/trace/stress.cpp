// Threads record into a small ring while it is read, exported, stopped and replaced; built with
// sanitizers by tools/run_sanitizers.py. Usage: stress SECONDS THREADS SEED.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "trace/chrome_trace.hpp"
#include "trace/recorder.hpp"
#include "trace/span.hpp"

namespace {

using namespace spillover;

constexpr TraceLabel kOuter{"outer", "test"};
constexpr TraceLabel kInner{"inner", "test"};

std::atomic<bool> running{true};

void record() {
  while (running) {
    const TraceSpan outer(kOuter, 1);
    const TraceSpan inner(kInner, 2);
    trace_counter(kOuter, trace_track(TrackKind::kCounter, "counter"), 1);
  }
}

void restart(unsigned seed) {
  std::minstd_rand random(seed);
  while (running) {
    stop_trace();
    start_trace(size_t{16} << random() % 4);
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 500));
  }
}

bool is_whole(const TraceEvent& event) {
  const bool is_outer = event.label == &kOuter && event.size_bytes == 1;
  const bool is_inner = event.label == &kInner && event.size_bytes == 2;
  return (is_outer || is_inner) && event.begin_ns > 0 && event.begin_ns <= event.end_ns;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(std::atoi(argv[1]));
  start_trace(16);
  std::vector<std::thread> threads;
  for (int i = 0; i < std::atoi(argv[2]); ++i) threads.emplace_back(record);
  threads.emplace_back(restart, static_cast<unsigned>(std::atoi(argv[3])));
  size_t seen = 0;
  bool failed = false;
  while (!failed && std::chrono::steady_clock::now() < end) {
    for (const TraceEvent& event : trace_contents().events) failed = failed || !is_whole(event);
    seen += chrome_trace({}).event_count;
  }
  running = false;
  for (std::thread& thread : threads) thread.join();
  std::printf("%zu events %s\n", seen, failed ? "and one that is torn" : "are whole");
  return failed || seen == 0 ? 1 : 0;
}
