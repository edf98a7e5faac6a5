#include "allocator/stream_key.hpp"

#include <atomic>

#include "base/error.hpp"
#include "driver/context.hpp"
#include "driver/stream.hpp"

namespace spillover {
namespace {

// Unlike std::thread::id, never reused.
uint64_t this_thread_number() {
  static std::atomic<uint64_t> next{1};
  thread_local const uint64_t number = next.fetch_add(1, std::memory_order_relaxed);
  return number;
}

}  // namespace

StreamKey identify_stream(int device, StreamHandle stream) {
  stream = normalize_stream(stream);
  if (stream == nullptr) return {};
  if (is_per_thread_stream(stream)) return {stream, this_thread_number()};
  const ContextScope scope(device);
  return {stream, stream_identity(stream)};
}

void check_not_capturing(int device, StreamHandle stream) {
  // The legacy default stream cannot capture.
  if (normalize_stream(stream) == nullptr) return;
  const ContextScope scope(device);
  if (stream_is_capturing(stream)) {
    throw StateError(
        "the stream is recording a CUDA graph, and spillover's allocator does not serve graph "
        "captures; allocate before the capture, or use torch's own allocator for this program");
  }
}

bool reachable_from_this_thread(const StreamKey& key) {
  return !is_per_thread_stream(key.handle) || key.identity == this_thread_number();
}

}  // namespace spillover
