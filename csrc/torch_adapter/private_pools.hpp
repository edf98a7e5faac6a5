// torch's private memory pools (torch.cuda.MemPool, CUDA graphs) over the pool's private arenas.
//
// One instance lives as long as the process. Any thread may call any function, with or without the
// GIL: each that takes the lock gives the GIL up first, as the lock is held over calls of the pool
// (Note [GIL] in gil.hpp). Order of locks: this one, then the pool's, then that of the numbers.
//
// A torch pool has one arena on each device while its use count is not 0. It is known by its number
// until the cache is emptied after that and the arena has no memory any more, so that snapshots and
// histories can say whose its last blocks are. One that is used again in the meantime gets a new
// arena.
//
// What an object does when it goes (remove_use, set_use_on_oom, trim) does nothing in a forked
// child of a process that has used CUDA: the pool is the parent's, and a lock may be held for ever.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/Device.h>
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <tuple>
#include <vector>

#include "torch_adapter/pool_source.hpp"

namespace spillover::torch_adapter {

class PrivatePools {
 public:
  using Filter = std::function<bool(cudaStream_t)>;

  // Leaked on purpose: graphs and pools are let go of until the very end of a process.
  static PrivatePools& instance();

  // The memory of a pool that is made by this comes from the allocator, where one is given.
  void add_use(c10::DeviceIndex device, c10::MempoolId_t id, PoolAllocator allocator = nullptr);
  void remove_use(c10::DeviceIndex device, c10::MempoolId_t id);
  int use_count(c10::DeviceIndex device, c10::MempoolId_t id);

  // From now on what is allocated on streams that the filter accepts comes from the pool, which
  // gets one more use. Of several such pools the one that began last is asked first. The thread's
  // current stream is the one that a graph is recorded on, if it is for one.
  void begin(c10::DeviceIndex device, c10::MempoolId_t id, Filter filter, cudaStream_t current);
  void end(c10::DeviceIndex device, c10::MempoolId_t id);

  void set_use_on_oom(c10::DeviceIndex device, c10::MempoolId_t id, bool use_on_oom);
  void set_no_split(c10::DeviceIndex device, c10::MempoolId_t id);

  // Returns the idle memory of a pool without a use to the driver. It is a destructor that asks for
  // it, so failures are reported, not thrown.
  void trim(c10::MempoolId_t id) noexcept;
  // Everything idle was returned: pools without a use need not be known any more.
  void forget_unused();

  // False while nothing comes from private pools.
  static bool is_routing() noexcept { return route_count.load(std::memory_order_relaxed) != 0; }
  // The arena to allocate from; no value for ordinary memory.
  std::optional<uint32_t> arena_for(c10::DeviceIndex device, cudaStream_t stream);

  std::optional<uint32_t> arena_of(c10::DeviceIndex device, c10::MempoolId_t id);
  // {0, 0} for an arena that is not, or no more, a pool's. May be called with the pool's lock held.
  c10::MempoolId_t id_of(c10::DeviceIndex device, uint32_t arena);

 private:
  using Key = std::tuple<c10::DeviceIndex, c10::CaptureId_t, c10::CaptureId_t>;
  struct PrivatePool {
    uint32_t arena = 0;
    int use_count = 0;
    bool use_on_oom = false;
    bool no_split = false;
  };
  struct Route {
    Key key;
    uint32_t arena;
    Filter filter;
  };

  PrivatePools() = default;

  static Key key_of(c10::DeviceIndex device, c10::MempoolId_t id) {
    return {device, id.first, id.second};
  }
  // Need the lock.
  PrivatePool& used(const Key& key);
  uint32_t add_use_of(const Key& key, PoolAllocator allocator);
  void remove_use_of(const Key& key);
  static void apply_options(const Key& key, const PrivatePool& pool);
  static bool has_memory(c10::DeviceIndex device, uint32_t arena);

  static inline std::atomic<int> route_count{0};

  std::mutex mutex_;
  // Guarded by mutex_.
  std::map<Key, PrivatePool> pools_;
  std::vector<Route> routes_;  // In the order in which they began.
  std::mutex ids_mutex_;       // The last of all locks.
  // By device and arena, those too whose pool has a new one; guarded by ids_mutex_.
  std::map<std::pair<c10::DeviceIndex, uint32_t>, c10::MempoolId_t> ids_;
};

}  // namespace spillover::torch_adapter
