#include "torch_adapter/private_pools.hpp"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdio>
#include <utility>

#include "torch_adapter/gil.hpp"
#include "torch_adapter/pool.hpp"

namespace spillover::torch_adapter {

PrivatePools& PrivatePools::instance() {
  static PrivatePools* const instance = new PrivatePools;
  return *instance;
}

PrivatePools::PrivatePool& PrivatePools::used(const Key& key) {
  const auto found = pools_.find(key);
  TORCH_CHECK(found != pools_.end() && found->second.use_count > 0,
              "spillover: there is no private memory pool (", std::get<1>(key), ", ",
              std::get<2>(key), ") in use on device ", static_cast<int>(std::get<0>(key)));
  return found->second;
}

void PrivatePools::apply_options(const Key& key, const PrivatePool& pool) {
  check_pool(spillover_set_arena_options(std::get<0>(key), pool.arena, pool.use_on_oom ? 1 : 0,
                                         pool.no_split ? 1 : 0),
             "setting the options of a private memory pool");
}

uint32_t PrivatePools::add_use_of(const Key& key, PoolAllocator allocator) {
  PrivatePool pool;
  const auto known = pools_.find(key);
  if (known != pools_.end() && known->second.use_count > 0) {
    pool = known->second;
  } else {
    pool.arena = allocator == nullptr
                     ? make_private_arena(std::get<0>(key))
                     : make_private_arena_from(std::get<0>(key), std::move(allocator));
    const std::lock_guard lock(ids_mutex_);
    ids_[{std::get<0>(key), pool.arena}] = {std::get<1>(key), std::get<2>(key)};
  }
  ++pool.use_count;
  pools_[key] = pool;
  return pool.arena;
}

void PrivatePools::add_use(c10::DeviceIndex device, c10::MempoolId_t id, PoolAllocator allocator) {
  const GilRelease no_gil;
  const std::lock_guard lock(mutex_);
  add_use_of(key_of(device, id), std::move(allocator));
}

void PrivatePools::remove_use(c10::DeviceIndex device, c10::MempoolId_t id) {
  if (spillover_in_forked_child() != 0) return;
  const GilRelease no_gil;
  const std::lock_guard lock(mutex_);
  remove_use_of(key_of(device, id));
}

void PrivatePools::remove_use_of(const Key& key) {
  PrivatePool& pool = used(key);
  if (--pool.use_count > 0) return;
  check_pool(spillover_release_arena(std::get<0>(key), pool.arena),
             "releasing a private memory pool");
}

int PrivatePools::use_count(c10::DeviceIndex device, c10::MempoolId_t id) {
  const GilRelease no_gil;
  const std::lock_guard lock(mutex_);
  const auto found = pools_.find(key_of(device, id));
  return found == pools_.end() ? 0 : found->second.use_count;
}

void PrivatePools::begin(c10::DeviceIndex device, c10::MempoolId_t id, Filter filter,
                         cudaStream_t current) {
  const GilRelease no_gil;
  const std::lock_guard lock(mutex_);
  const Key key = key_of(device, id);
  for (const Route& route : routes_) {
    TORCH_CHECK(route.key != key, "beginAllocateToPool: already recording to mempool_id");
  }
  const uint32_t arena = add_use_of(key, nullptr);
  try {
    check_pool(spillover_expect_stream(device, arena, current), "beginning to use a memory pool");
  } catch (...) {
    remove_use_of(key);
    throw;
  }
  routes_.push_back({key, arena, std::move(filter)});
  route_count.fetch_add(1, std::memory_order_relaxed);
}

void PrivatePools::end(c10::DeviceIndex device, c10::MempoolId_t id) {
  const GilRelease no_gil;
  const std::lock_guard lock(mutex_);
  const Key key = key_of(device, id);
  const auto route = std::find_if(routes_.begin(), routes_.end(),
                                  [&](const Route& known) { return known.key == key; });
  TORCH_CHECK(route != routes_.end(), "endAllocatePool: not currently recording to mempool_id");
  routes_.erase(route);
  route_count.fetch_sub(1, std::memory_order_relaxed);
}

void PrivatePools::set_use_on_oom(c10::DeviceIndex device, c10::MempoolId_t id, bool use_on_oom) {
  if (spillover_in_forked_child() != 0) return;
  const GilRelease no_gil;
  const std::lock_guard lock(mutex_);
  const Key key = key_of(device, id);
  // A destructor turns it off, and must not throw.
  if (!use_on_oom && (pools_.count(key) == 0 || !pools_.at(key).use_on_oom)) return;
  PrivatePool& pool = used(key);
  pool.use_on_oom = use_on_oom;
  apply_options(key, pool);
}

void PrivatePools::set_no_split(c10::DeviceIndex device, c10::MempoolId_t id) {
  const GilRelease no_gil;
  const std::lock_guard lock(mutex_);
  const Key key = key_of(device, id);
  PrivatePool& pool = used(key);
  pool.no_split = true;
  apply_options(key, pool);
}

void PrivatePools::trim(c10::MempoolId_t id) noexcept {
  if (spillover_in_forked_child() != 0) return;
  const GilRelease no_gil;
  std::vector<std::pair<c10::DeviceIndex, uint32_t>> unused;
  {
    const std::lock_guard lock(mutex_);
    for (const auto& [key, pool] : pools_) {
      if (pool.use_count == 0 && key == key_of(std::get<0>(key), id)) {
        unused.emplace_back(std::get<0>(key), pool.arena);
      }
    }
  }
  // It waits for the device, so not under the lock.
  for (const auto& [device, arena] : unused) {
    if (spillover_trim_arena(device, arena) == SPILLOVER_OK) continue;
    std::fprintf(stderr,
                 "spillover: giving the memory of a private memory pool back failed, which "
                 "emptying the cache does again: %s\n",
                 last_pool_error());
  }
}

// Whether an arena that was released has memory still. Needs the lock.
bool PrivatePools::has_memory(c10::DeviceIndex device, uint32_t arena) {
  spillover_tag_stats_t stats{};
  check_pool(spillover_tag_stats(device, arena, &stats), "reading the statistics of a pool");
  return stats.allocation != 0 || stats.reserved_bytes != 0 || stats.asleep_bytes != 0;
}

void PrivatePools::forget_unused() {
  const GilRelease no_gil;
  const std::lock_guard lock(mutex_);
  std::erase_if(pools_, [](const auto& entry) {
    return entry.second.use_count == 0 && !has_memory(std::get<0>(entry.first), entry.second.arena);
  });
  std::vector<std::pair<c10::DeviceIndex, uint32_t>> arenas;
  {
    const std::lock_guard ids_lock(ids_mutex_);
    for (const auto& [arena, id] : ids_) arenas.push_back(arena);
  }
  for (const auto& [key, pool] : pools_) {
    std::erase(arenas, std::pair{std::get<0>(key), pool.arena});
  }
  std::erase_if(arenas, [](const auto& arena) { return has_memory(arena.first, arena.second); });
  const std::lock_guard ids_lock(ids_mutex_);
  for (const auto& arena : arenas) ids_.erase(arena);
}

std::optional<uint32_t> PrivatePools::arena_for(c10::DeviceIndex device, cudaStream_t stream) {
  const GilRelease no_gil;
  const std::lock_guard lock(mutex_);
  for (auto route = routes_.rbegin(); route != routes_.rend(); ++route) {
    if (std::get<0>(route->key) == device && route->filter(stream)) return route->arena;
  }
  return std::nullopt;
}

std::optional<uint32_t> PrivatePools::arena_of(c10::DeviceIndex device, c10::MempoolId_t id) {
  const GilRelease no_gil;
  const std::lock_guard lock(mutex_);
  const auto found = pools_.find(key_of(device, id));
  if (found == pools_.end()) return std::nullopt;
  return found->second.arena;
}

c10::MempoolId_t PrivatePools::id_of(c10::DeviceIndex device, uint32_t arena) {
  const std::lock_guard lock(ids_mutex_);
  const auto found = ids_.find({device, arena});
  return found == ids_.end() ? c10::MempoolId_t{0, 0} : found->second;
}

}  // namespace spillover::torch_adapter
