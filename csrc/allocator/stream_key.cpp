#include "allocator/stream_key.hpp"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <utility>
#include <vector>

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

// The kept streams: a list that only grows, replaced as a whole, so that readers take no lock. Each
// version is leaked, as a reader may still hold it; torch keeps 97 streams a device at most.
using KeptStreams = std::vector<std::pair<int, StreamHandle>>;

std::atomic<const KeptStreams*>& kept_streams() {
  static std::atomic<const KeptStreams*> streams{new KeptStreams};
  return streams;
}

bool is_kept(int device, StreamHandle stream) {
  const KeptStreams& streams = *kept_streams().load(std::memory_order_acquire);
  return std::binary_search(streams.begin(), streams.end(), std::pair(device, stream));
}

}  // namespace

StreamKey identify_stream(int device, StreamHandle stream) {
  stream = normalize_stream(stream);
  if (stream == nullptr) return {};
  if (is_per_thread_stream(stream)) return {stream, this_thread_number()};
  if (is_kept(device, stream)) return {stream, 0};
  const ContextScope scope(device);
  return {stream, stream_identity(stream)};
}

int device_of_stream(int device, StreamHandle stream) {
  stream = normalize_stream(stream);
  if (stream == nullptr || is_per_thread_stream(stream) || is_kept(device, stream)) return device;
  return stream_device(stream);
}

void keep_stream(int device, StreamHandle stream) {
  static std::mutex& mutex = *new std::mutex;
  stream = normalize_stream(stream);
  if (stream == nullptr || is_per_thread_stream(stream)) return;
  const std::lock_guard lock(mutex);
  if (is_kept(device, stream)) return;
  auto* streams = new KeptStreams(*kept_streams().load(std::memory_order_relaxed));
  const std::pair entry(device, stream);
  streams->insert(std::lower_bound(streams->begin(), streams->end(), entry), entry);
  kept_streams().store(streams, std::memory_order_release);
}

bool is_immortal(int device, const StreamKey& key) {
  return key.handle == nullptr || (key.identity == 0 && is_kept(device, key.handle));
}

bool may_be_asked(int device, const StreamKey& key) {
  if (is_per_thread_stream(key.handle)) return key.identity == this_thread_number();
  return is_immortal(device, key);
}

void check_not_capturing(int device, StreamHandle stream) {
  // The legacy default stream cannot capture.
  if (normalize_stream(stream) == nullptr) return;
  const ContextScope scope(device);
  if (stream_is_capturing(stream)) {
    throw StateError(
        "the stream is recording a CUDA graph, whose memory must stay where it is; allocate before "
        "the capture, or from a private arena (torch.cuda.graph and use_mem_pool do so)");
  }
}

}  // namespace spillover
