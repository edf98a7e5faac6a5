#include "allocator/pools.hpp"

#include <array>
#include <atomic>
#include <mutex>
#include <string>

#include "base/error.hpp"
#include "driver/context.hpp"
#include "driver/fork_guard.hpp"

namespace spillover {
namespace {

constexpr int kDevicesMax = 64;

struct Pools {
  SegmentIndex index;
  std::mutex creation_mutex;
  std::array<std::atomic<Pool*>, kDevicesMax> by_device{};
};

Pools& pools() {
  static auto& instance = *new Pools;
  return instance;
}

}  // namespace

Pool& pool_of_device(int device) {
  check_not_forked();
  Pools& all = pools();
  if (device >= 0 && device < kDevicesMax) {
    if (Pool* pool = all.by_device[static_cast<size_t>(device)].load(std::memory_order_acquire)) {
      return *pool;
    }
  }
  PrimaryContext::of(device);  // Throws for a device that does not exist.
  const std::lock_guard lock(all.creation_mutex);
  auto& slot = all.by_device[static_cast<size_t>(device)];
  if (slot.load(std::memory_order_relaxed) == nullptr) {
    slot.store(new Pool(device, all.index), std::memory_order_release);
  }
  return *slot.load(std::memory_order_relaxed);
}

Pool* find_pool(const void* pointer) {
  check_not_forked();
  const auto entry = pools().index.find(reinterpret_cast<DeviceAddress>(pointer));
  return entry ? entry->pool : nullptr;
}

Pool& pool_of_address(const void* pointer) {
  if (Pool* pool = find_pool(pointer)) return *pool;
  throw ConfigError("the address " + std::to_string(reinterpret_cast<DeviceAddress>(pointer)) +
                    " is not in spillover's device memory: it was freed before, or comes from "
                    "another allocator");
}

}  // namespace spillover
