// torch's private memory pools (CUDA graphs, torch.cuda.MemPool) over the pool's private arenas.
//
// One instance lives as long as the process. Any thread may call any function, without the GIL: the
// lock is held over calls of the pool. Order of locks: this one, then the pool's.
//
// What an object does when it goes (remove_use, set_options, trim) does nothing in a forked child
// of a process that has used CUDA.
//
// What is kept is what torch_adapter/private_pools.hpp keeps, in the types that torch's pluggable
// allocator is called with; that class is compiled with torch's headers, this one is without them.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

// CUDA's own name of what a stream's handle points to.
struct CUstream_st;

namespace spillover::plain_adapter {

using Stream = CUstream_st*;
// torch's MempoolId_t.
using PoolId = std::pair<unsigned long long, unsigned long long>;
using Filter = std::function<bool(Stream)>;

class PrivatePools {
 public:
  // Leaked on purpose: graphs and pools are let go of until the very end of a process.
  static PrivatePools& instance();

  void add_use(int device, const PoolId& id);
  void remove_use(int device, const PoolId& id);
  int use_count(int device, const PoolId& id);

  // From now on what is allocated on streams that the filter accepts comes from the pool, which
  // gets one more use. Of several such pools the one that began last is asked first.
  void begin(int device, const PoolId& id, Filter filter);
  void end(int device, const PoolId& id);

  // use_on_oom: its free memory serves ordinary requests that would fail otherwise. no_split: each
  // block has chunks of its own.
  void set_options(int device, const PoolId& id, bool use_on_oom, bool no_split);

  // Returns the idle memory of a pool without a use to the driver.
  void trim(int device, const PoolId& id);
  // Everything idle was returned: pools without a use need not be known any more.
  void forget_unused();

  // False while nothing comes from private pools.
  static bool is_routing() noexcept { return route_count.load(std::memory_order_relaxed) != 0; }
  // The arena to allocate from; no value for ordinary memory.
  std::optional<uint32_t> arena_for(int device, Stream stream);

  std::optional<uint32_t> arena_of(int device, const PoolId& id);
  // {0, 0} for an arena that is not, or no more, a pool's.
  PoolId id_of(int device, uint32_t arena);

 private:
  using Key = std::tuple<int, unsigned long long, unsigned long long>;
  struct PrivatePool {
    uint32_t arena = 0;
    int use_count = 0;
  };
  struct Route {
    Key key;
    uint32_t arena;
    Filter filter;
  };

  PrivatePools() = default;

  static Key key_of(int device, const PoolId& id) { return {device, id.first, id.second}; }
  // Need the lock.
  PrivatePool& used(const Key& key);
  uint32_t add_use_of(const Key& key);

  static inline std::atomic<int> route_count{0};

  std::mutex mutex_;
  // Guarded by mutex_.
  std::map<Key, PrivatePool> pools_;
  std::vector<Route> routes_;  // In the order in which they began.
};

}  // namespace spillover::plain_adapter
