#include "allocator/pools.hpp"

#include <array>
#include <atomic>
#include <mutex>
#include <string>

#include "allocator/page_table.hpp"
#include "base/error.hpp"
#include "driver/context.hpp"
#include "driver/fork_guard.hpp"

namespace spillover {
namespace {

constexpr int kDevicesMax = 64;

struct Pools {
  std::mutex creation_mutex;
  std::array<std::atomic<Pool*>, kDevicesMax> by_device{};
};

Pools& pools() {
  static auto& instance = *new Pools;
  return instance;
}

}  // namespace

Pool* existing_pool(int device) noexcept {
  if (device < 0 || device >= kDevicesMax || in_forked_child()) return nullptr;
  return pools().by_device[static_cast<size_t>(device)].load(std::memory_order_acquire);
}

Pool& pool_of_device(int device) {
  check_not_forked();
  if (Pool* pool = existing_pool(device)) return *pool;
  Pools& all = pools();
  PrimaryContext::of(device);  // Throws for a device that does not exist.
  const std::lock_guard lock(all.creation_mutex);
  auto& slot = all.by_device[static_cast<size_t>(device)];
  if (slot.load(std::memory_order_relaxed) == nullptr) {
    slot.store(new Pool(device), std::memory_order_release);
  }
  return *slot.load(std::memory_order_relaxed);
}

Pool* find_pool(const void* pointer) {
  check_not_forked();
  return PageTable::instance().pool_of(reinterpret_cast<DeviceAddress>(pointer));
}

Pool& pool_of_address(const void* pointer) {
  if (Pool* pool = find_pool(pointer)) return *pool;
  throw ConfigError("the address " + std::to_string(reinterpret_cast<DeviceAddress>(pointer)) +
                    " is not in spillover's device memory: it was freed before, or comes from "
                    "another allocator");
}

}  // namespace spillover
