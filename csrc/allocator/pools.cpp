#include "allocator/pools.hpp"

#include <array>
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <string>

#include "allocator/page_table.hpp"
#include "base/error.hpp"
#include "driver/context.hpp"
#include "driver/fork_guard.hpp"

namespace spillover {
namespace {

struct Pools {
  std::mutex creation_mutex;  // Taken before a pool's mutex.
  // Of pools that are not made yet; empty until the environment was read. Guarded by the mutex.
  std::optional<Settings> settings;
  std::array<std::atomic<Pool*>, kDevicesMax> by_device{};
};

Pools& pools() {
  static auto& instance = *new Pools;
  return instance;
}

// Needs the mutex.
const Settings& settings_for_new(Pools& all) {
  if (!all.settings) {
    const char* text = std::getenv("SPILLOVER_ALLOCATOR");
    all.settings = parse_settings(text == nullptr ? "" : text, "SPILLOVER_ALLOCATOR", {});
  }
  return *all.settings;
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
    slot.store(new Pool(device, settings_for_new(all)), std::memory_order_release);
  }
  return *slot.load(std::memory_order_relaxed);
}

void configure_pools(int device, std::string_view settings, std::string_view source) {
  if (device >= 0) {
    Pool& pool = pool_of_device(device);
    const std::lock_guard lock(pools().creation_mutex);
    pool.configure(parse_settings(settings, source, pool.settings()));
    return;
  }
  check_not_forked();
  Pools& all = pools();
  const std::lock_guard lock(all.creation_mutex);
  const Settings for_new = parse_settings(settings, source, settings_for_new(all));
  for (const auto& slot : all.by_device) {
    Pool* pool = slot.load(std::memory_order_relaxed);
    if (pool != nullptr) pool->configure(parse_settings(settings, source, pool->settings()));
  }
  all.settings = for_new;
}

void set_memory_fraction(int device, double fraction) {
  if (!(fraction >= 0.0 && fraction <= 1.0)) {
    throw ConfigError("a memory fraction must be from 0 to 1, got " + std::to_string(fraction));
  }
  Pool& pool = pool_of_device(device);
  const std::lock_guard lock(pools().creation_mutex);
  Settings settings = pool.settings();
  settings.fraction = fraction;
  pool.configure(settings);
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
