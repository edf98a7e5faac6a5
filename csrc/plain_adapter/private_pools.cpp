#include "plain_adapter/private_pools.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "plain_adapter/pool_calls.hpp"

namespace spillover::plain_adapter {

PrivatePools& PrivatePools::instance() {
  static PrivatePools* const instance = new PrivatePools;
  return *instance;
}

PrivatePools::PrivatePool& PrivatePools::used(const Key& key) {
  const auto found = pools_.find(key);
  if (found == pools_.end() || found->second.use_count == 0) {
    throw std::runtime_error("spillover: there is no private memory pool (" +
                             std::to_string(std::get<1>(key)) + ", " +
                             std::to_string(std::get<2>(key)) + ") in use on device " +
                             std::to_string(std::get<0>(key)));
  }
  return found->second;
}

uint32_t PrivatePools::add_use_of(const Key& key) {
  PrivatePool pool;
  const auto known = pools_.find(key);
  if (known != pools_.end() && known->second.use_count > 0) {
    pool = known->second;
  } else {
    require(spillover_make_arena(std::get<0>(key), &pool.arena), "making a private memory pool");
  }
  ++pool.use_count;
  pools_[key] = pool;
  return pool.arena;
}

void PrivatePools::add_use(int device, const PoolId& id) {
  const std::lock_guard lock(mutex_);
  add_use_of(key_of(device, id));
}

void PrivatePools::remove_use(int device, const PoolId& id) {
  if (spillover_in_forked_child() != 0) return;  // It is the parent's, and its lock may be held.
  const std::lock_guard lock(mutex_);
  PrivatePool& pool = used(key_of(device, id));
  if (--pool.use_count > 0) return;
  require(spillover_release_arena(device, pool.arena), "releasing a private memory pool");
}

int PrivatePools::use_count(int device, const PoolId& id) {
  const std::lock_guard lock(mutex_);
  const auto found = pools_.find(key_of(device, id));
  return found == pools_.end() ? 0 : found->second.use_count;
}

void PrivatePools::begin(int device, const PoolId& id, Filter filter) {
  const std::lock_guard lock(mutex_);
  const Key key = key_of(device, id);
  for (const Route& route : routes_) {
    if (route.key == key) {
      throw std::runtime_error("beginAllocateToPool: already recording to mempool_id");
    }
  }
  routes_.push_back({key, add_use_of(key), std::move(filter)});
  route_count.fetch_add(1, std::memory_order_relaxed);
}

void PrivatePools::end(int device, const PoolId& id) {
  const std::lock_guard lock(mutex_);
  const Key key = key_of(device, id);
  const auto route = std::find_if(routes_.begin(), routes_.end(),
                                  [&](const Route& known) { return known.key == key; });
  if (route == routes_.end()) {
    throw std::runtime_error("endAllocatePool: not currently recording to mempool_id");
  }
  routes_.erase(route);
  route_count.fetch_sub(1, std::memory_order_relaxed);
}

void PrivatePools::set_options(int device, const PoolId& id, bool use_on_oom, bool no_split) {
  if (spillover_in_forked_child() != 0) return;
  const std::lock_guard lock(mutex_);
  const PrivatePool& pool = used(key_of(device, id));
  require(spillover_set_arena_options(device, pool.arena, use_on_oom ? 1 : 0, no_split ? 1 : 0),
          "setting the options of a private memory pool");
}

void PrivatePools::trim(int device, const PoolId& id) {
  if (spillover_in_forked_child() != 0) return;
  std::optional<uint32_t> unused;
  {
    const std::lock_guard lock(mutex_);
    const auto found = pools_.find(key_of(device, id));
    if (found != pools_.end() && found->second.use_count == 0) unused = found->second.arena;
  }
  // It waits for the device, so not under the lock.
  if (unused) require(spillover_trim_arena(device, *unused), "emptying a private memory pool");
}

void PrivatePools::forget_unused() {
  const std::lock_guard lock(mutex_);
  std::erase_if(pools_, [](const auto& entry) { return entry.second.use_count == 0; });
}

std::optional<uint32_t> PrivatePools::arena_for(int device, Stream stream) {
  const std::lock_guard lock(mutex_);
  for (auto route = routes_.rbegin(); route != routes_.rend(); ++route) {
    if (std::get<0>(route->key) == device && route->filter(stream)) return route->arena;
  }
  return std::nullopt;
}

std::optional<uint32_t> PrivatePools::arena_of(int device, const PoolId& id) {
  const std::lock_guard lock(mutex_);
  const auto found = pools_.find(key_of(device, id));
  if (found == pools_.end()) return std::nullopt;
  return found->second.arena;
}

PoolId PrivatePools::id_of(int device, uint32_t arena) {
  const std::lock_guard lock(mutex_);
  for (const auto& [key, pool] : pools_) {
    if (std::get<0>(key) == device && pool.arena == arena) {
      return {std::get<1>(key), std::get<2>(key)};
    }
  }
  return {0, 0};
}

}  // namespace spillover::plain_adapter
