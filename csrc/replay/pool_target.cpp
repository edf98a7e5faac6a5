// The device pool as a target of replays.
#include <algorithm>
#include <atomic>

#include "allocator/c_api.h"
#include "replay/c_api.h"

namespace {

std::atomic<int> pool_device{0};

std::size_t pool_reserved_bytes() {
  spillover_stats_t stats;
  if (spillover_stats(pool_device, &stats) != SPILLOVER_OK) return 0;
  return static_cast<std::size_t>(
      std::max<std::int64_t>(stats.reserved_bytes[SPILLOVER_CLASS_ALL].current, 0));
}

constexpr spillover_replay_target kPoolTarget = {
    .allocate =
        [](std::size_t size_bytes, void* stream, void** out) {
          return static_cast<int>(spillover_alloc(pool_device, size_bytes, stream, out));
        },
    .free = [](void* pointer) { return static_cast<int>(spillover_free(pointer)); },
    .record_stream =
        [](void* pointer, void* stream) {
          return static_cast<int>(spillover_record_stream(pointer, stream));
        },
    .reserved_bytes = pool_reserved_bytes,
    .last_error = spillover_last_error,
};

}  // namespace

extern "C" const spillover_replay_target* spillover_replay_pool_target(int device) {
  pool_device = device;
  return &kPoolTarget;
}
