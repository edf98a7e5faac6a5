// Observers of torch's CUDA allocator that have no binding in Python, and those that have, for
// test_torch_observers.py: they note what they are told as lines of text.
#include <c10/cuda/CUDACachingAllocator.h>

#include <atomic>
#include <cstddef>
#include <cstring>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>

namespace {

std::mutex g_mutex;
std::string g_lines;  // Guarded by g_mutex.
std::atomic<bool> g_fails_on_segments{false};

template <class... Facts>
void note(const char* name, const Facts&... facts) {
  std::ostringstream line;
  line << name;
  ((line << ' ' << facts), ...);
  const std::lock_guard lock(g_mutex);
  g_lines += line.str() + '\n';
}

}  // namespace

extern "C" {

void attach_observers() {
  namespace cuda_allocator = c10::cuda::CUDACachingAllocator;
  cuda_allocator::attachOutOfMemoryObserver(
      [](int64_t device, size_t size_bytes, size_t total_bytes, size_t free_bytes) {
        note("out_of_memory", device, size_bytes, total_bytes, free_bytes);
      });
#if TORCH_VERSION_MINOR >= 12
  cuda_allocator::attachOomRejectionObserver(
      [](int64_t, size_t, size_t, size_t) { throw std::runtime_error("one that throws"); });
  cuda_allocator::attachOomRejectionObserver(
      [](int64_t device, size_t size_bytes, size_t allocated_bytes, size_t total_bytes) {
        note("rejection", device, size_bytes, allocated_bytes, total_bytes);
      });
#endif
  cuda_allocator::attachAllocatorTraceTracker([](const cuda_allocator::TraceEntry& entry) {
    note("trace", static_cast<int>(entry.action_), static_cast<int>(entry.device_), entry.size_,
         entry.addr_, entry.mempool_.first, entry.mempool_.second);
    const bool is_of_segment = entry.action_ == cuda_allocator::TraceEntry::SEGMENT_ALLOC ||
                               entry.action_ == cuda_allocator::TraceEntry::SEGMENT_MAP;
    if (is_of_segment && g_fails_on_segments) throw std::runtime_error("one that throws");
  });
}

void fail_on_segments(int value) {
  g_fails_on_segments = value != 0;
}

// What was noted since the last call, as far as there is room.
void take_lines(char* out, size_t capacity) {
  const std::lock_guard lock(g_mutex);
  std::strncpy(out, g_lines.c_str(), capacity - 1);
  out[capacity - 1] = '\0';
  g_lines.clear();
}

}  // extern "C"
