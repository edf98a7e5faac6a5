#include "allocator/pools.hpp"

#include <array>
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "allocator/page_table.hpp"
#include "base/bytes.hpp"
#include "base/error.hpp"
#include "driver/context.hpp"
#include "driver/device.hpp"
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

Pool* pool_if_made(int device) {
  check_not_forked();
  if (Pool* pool = existing_pool(device)) return pool;
  require_device(device);
  return nullptr;
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

void configure_pool(int device, std::string_view settings, std::string_view source) {
  check_not_forked();
  PrimaryContext::of(device);  // Throws for a device that does not exist.
  Pools& all = pools();
  const std::lock_guard lock(all.creation_mutex);
  auto& slot = all.by_device[static_cast<size_t>(device)];
  if (Pool* pool = slot.load(std::memory_order_relaxed)) {
    pool->configure(parse_settings(settings, source, pool->settings()));
    return;
  }
  const Settings first = parse_settings(settings, source, settings_for_new(all));
  slot.store(new Pool(device, first), std::memory_order_release);
}

void configure_pools(std::string_view settings, std::string_view source) {
  check_not_forked();
  Pools& all = pools();
  const std::lock_guard lock(all.creation_mutex);
  const Settings for_new = parse_settings(settings, source, settings_for_new(all));
  std::vector<std::pair<Pool*, Settings>> changes;
  for (const auto& slot : all.by_device) {
    Pool* pool = slot.load(std::memory_order_relaxed);
    if (pool == nullptr) continue;
    changes.emplace_back(pool, parse_settings(settings, source, pool->settings()));
  }
  // Before the first change: what one device refuses, none of them takes.
  for (const auto& [pool, changed] : changes) pool->require_changeable(changed);
  std::vector<std::pair<Pool*, Settings>> former;
  for (const auto& [pool, changed] : changes) former.emplace_back(pool, pool->settings());
  try {
    for (const auto& [pool, changed] : changes) pool->configure(changed);
  } catch (...) {
    for (const auto& [pool, settings] : former) pool->restore_settings(settings);
    throw;
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
  throw ConfigError("the address " + format_address(pointer) +
                    " is not in spillover's device memory: it was freed before, or comes from "
                    "another allocator");
}

}  // namespace spillover
