// Functions for torch's CUDAPluggableAllocator, with the signatures that it asks for.
//
// Exported by libspillover.so; torch calls these functions from any thread, with or without the
// GIL. Unlike the C interface they throw: torch takes a NULL for success and would make a tensor at
// address 0, while an exception reaches Python with its text. Frees do not: destructors call them.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "allocator/c_api.h"
#include "plain_adapter/allocator.hpp"
#include "plain_adapter/interpreter.hpp"
#include "plain_adapter/pool_calls.hpp"
#include "plain_adapter/private_pools.hpp"
#include "plain_adapter/torch_functions.hpp"

namespace spillover::plain_adapter {
namespace {

// Larger requests are mistakes, often a negative size; torch's own limit.
constexpr size_t kSizeMax = size_t{1} << 60U;
constexpr int kDevicesMax = 64;

// As torch has said; 0 before it has initialised CUDA.
std::atomic<int> device_count{0};
std::atomic<bool> keeps_idle{true};

// Which devices may use each other's memory. torch tells its own allocators when two of them become
// peers, pluggable ones it does not; mapped memory has access rights of its own, so all pairs that
// can have them. A device that is not used gets no context for that.
class Peers {
 public:
  static Peers& instance() {
    static Peers* const instance = new Peers;
    return *instance;
  }

  void set(int device, uint64_t peers) {
    const std::lock_guard lock(mutex_);
    peers_.at(static_cast<size_t>(device)) = peers;
  }

  void on_use(int device) {
    if (device < 0 || device >= kDevicesMax) return;  // The pool says so.
    const uint64_t bit = uint64_t{1} << static_cast<unsigned>(device);
    if ((used_.load(std::memory_order_acquire) & bit) != 0) return;
    const GilRelease no_gil;
    const std::lock_guard lock(mutex_);
    for (int other = 0; other < kDevicesMax; ++other) {
      if ((used_.load(std::memory_order_relaxed) >> static_cast<unsigned>(other) & 1U) == 0) {
        continue;
      }
      connect(device, other);
      connect(other, device);
    }
    used_.fetch_or(bit, std::memory_order_release);
  }

  template <class Function>
  void for_each_used(Function function) const {
    uint64_t left = used_.load(std::memory_order_acquire);
    for (int device = 0; left != 0; ++device, left >>= 1U) {
      if ((left & 1U) != 0) function(device);
    }
  }

 private:
  // Needs the lock.
  void connect(int device, int peer) {
    const uint64_t peers = peers_.at(static_cast<size_t>(device));
    if ((peers >> static_cast<unsigned>(peer) & 1U) == 0) return;
    require(spillover_add_peer(device, peer), "giving a device access to its peer");
  }

  std::mutex mutex_;
  std::array<uint64_t, kDevicesMax> peers_{};  // Guarded by mutex_.
  std::atomic<uint64_t> used_{0};              // Written under mutex_.
};

struct Observers {
  std::mutex mutex;
  std::vector<OutOfMemoryObserver> list;  // Guarded by mutex.
};

Observers& observers() {
  // Leaked on purpose: observers hold Python objects, which must not be released after Python.
  static Observers* const instance = new Observers;
  return *instance;
}

[[noreturn]] void fail_to_allocate(size_t size_bytes, int device, spillover_status status) {
  if (status != SPILLOVER_OUT_OF_MEMORY) fail("allocating device memory");
  spillover_out_of_memory_t figures{};
  if (spillover_last_out_of_memory(&figures) != SPILLOVER_OK) {
    throw_torch_out_of_memory("CUDA out of memory. Tried to allocate " +
                              std::to_string(size_bytes) + " bytes. " + spillover_last_error());
  }
  // Observers may call the pool, whose texts are valid until then.
  const std::string message = figures.text;
  std::vector<OutOfMemoryObserver> list;
  {
    const std::lock_guard lock(observers().mutex);
    list = observers().list;
  }
  const size_t allowed_bytes = std::min(figures.total_bytes, figures.limit_bytes);
  report_out_of_memory(size_bytes, figures.allocated_bytes, figures.reserved_bytes, device);
  for (const auto& observer : list) {
    observer(device, size_bytes, allowed_bytes, figures.free_bytes);
  }
  throw_torch_out_of_memory(message);
}

// The profiler's view of a block that has come or gone.
void tell_profiler(void* pointer, int64_t change_bytes, int device) {
  spillover_stats_t stats{};
  require(without_gil([&] { return spillover_stats(device, &stats); }), "reading the statistics");
  report_memory(pointer, change_bytes,
                static_cast<size_t>(stats.allocated_bytes[SPILLOVER_CLASS_ALL].current),
                static_cast<size_t>(stats.reserved_bytes[SPILLOVER_CLASS_ALL].current), device);
}

void report_free_failure(void* pointer) noexcept {
  std::fprintf(stderr, "spillover: freeing device memory at %p failed: %s\n", pointer,
               spillover_last_error());
}

}  // namespace

void fail(const char* operation) {
  throw std::runtime_error(std::string("spillover: ") + operation + ": " + spillover_last_error());
}

void set_caching(bool value) {
  keeps_idle = value;
  if (value) return;
  for (int device = 0; device < device_count; ++device) {
    require(spillover_trim(device, 0), "emptying the cache");
  }
}

bool is_caching() noexcept {
  return keeps_idle;
}

void add_out_of_memory_observer(OutOfMemoryObserver observer) {
  const std::lock_guard lock(observers().mutex);
  observers().list.push_back(std::move(observer));
}

void set_peers(int device, uint64_t peers) {
  Peers::instance().set(device, peers);
}

}  // namespace spillover::plain_adapter

namespace plain = spillover::plain_adapter;

extern "C" {

void spillover_pluggable_init(int count) {
  // torch's own switch for debuggers of memory.
  if (std::getenv("PYTORCH_NO_CUDA_MEMORY_CACHING") != nullptr) plain::keeps_idle = false;
  plain::device_count = std::min(count, plain::kDevicesMax);
}

// Memory for size_bytes on the device, ready for use on stream; NULL for a size of 0 only.
void* spillover_pluggable_alloc(size_t size_bytes, int device, void* stream) {
  if (size_bytes == 0) return nullptr;
  if (size_bytes >= plain::kSizeMax) {
    plain::throw_torch_out_of_memory("CUDA out of memory. Tried to allocate more than 1EB memory.");
  }
  plain::Peers::instance().on_use(device);
  std::optional<uint32_t> arena;
  if (plain::PrivatePools::is_routing()) {
    arena = plain::without_gil([&] {
      return plain::PrivatePools::instance().arena_for(device, static_cast<plain::Stream>(stream));
    });
  }
  void* pointer = nullptr;
  spillover_status status =
      arena ? SPILLOVER_BUSY : spillover_try_alloc(device, size_bytes, stream, &pointer);
  if (status == SPILLOVER_BUSY) {
    status = plain::without_gil([&] {
      return arena ? spillover_alloc_in(device, size_bytes, stream, *arena, &pointer)
                   : spillover_alloc(device, size_bytes, stream, &pointer);
    });
  }
  if (status != SPILLOVER_OK) plain::fail_to_allocate(size_bytes, device, status);
  if (plain::is_profiling()) {
    plain::tell_profiler(pointer, static_cast<int64_t>(size_bytes), device);
  }
  return pointer;
}

// The pool knows a block's size, device and stream from its address.
void spillover_pluggable_free(void* pointer, size_t size_bytes, int device, void* /*stream*/) {
  if (pointer == nullptr) return;
  // Only live blocks have a device; in a forked child none has.
  const int trimmed_device = plain::is_caching() ? -1 : spillover_device_of(pointer);
  spillover_status status = spillover_try_free(pointer);
  if (status == SPILLOVER_BUSY) {
    status = plain::without_gil([&] { return spillover_free(pointer); });
  }
  if (status == SPILLOVER_OK && trimmed_device >= 0) {
    status = plain::without_gil([&] { return spillover_trim(trimmed_device, 0); });
  }
  if (status != SPILLOVER_OK) {
    plain::report_free_failure(pointer);
  } else if (plain::is_profiling()) {
    plain::tell_profiler(pointer, -static_cast<int64_t>(size_bytes), device);
  }
}

// torch gives no device with the stream, and a default stream is one of each device: all that are
// used are noted then.
void spillover_pluggable_record_stream(void* pointer, void* stream) {
  // Empty tensors, and storages that another allocator made, are not ours to hold.
  if (pointer == nullptr || spillover_device_of(pointer) < 0) return;
  const plain::GilRelease no_gil;
  if (stream != nullptr) {
    plain::require(spillover_record_stream(pointer, stream), "record_stream");
    return;
  }
  plain::Peers::instance().for_each_used([&](int device) {
    plain::require(spillover_record_stream_of(pointer, device, stream), "record_stream");
  });
}

// torch.cuda.empty_cache() names no device.
void spillover_pluggable_empty_cache() {
  const plain::GilRelease no_gil;
  for (int device = 0; device < plain::device_count; ++device) {
    plain::require(spillover_trim(device, 0), "emptying the cache");
  }
  plain::PrivatePools::instance().forget_unused();
}

void* spillover_pluggable_base(void* pointer, size_t* size_bytes) {
  void* base = nullptr;
  size_t segment_bytes = 0;
  plain::require(spillover_base(pointer, &base, &segment_bytes), "looking up a block's segment");
  if (size_bytes != nullptr) *size_bytes = segment_bytes;
  return base;
}

void spillover_pluggable_set_memory_fraction(double fraction, int device) {
  const plain::GilRelease no_gil;
  plain::require(spillover_set_memory_fraction(device, fraction), "setting the memory fraction");
}

void spillover_pluggable_begin_pool(int device, plain::PoolId id, plain::Filter filter) {
  const plain::GilRelease no_gil;
  plain::PrivatePools::instance().begin(device, id, std::move(filter));
}

void spillover_pluggable_end_pool(int device, plain::PoolId id) {
  const plain::GilRelease no_gil;
  plain::PrivatePools::instance().end(device, id);
}

void spillover_pluggable_release_pool(int device, plain::PoolId id) {
  const plain::GilRelease no_gil;
  plain::PrivatePools::instance().remove_use(device, id);
}
}
