#include "torch_adapter/out_of_memory.hpp"

#include <c10/core/DeviceGuard.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "torch_adapter/history.hpp"
#include "torch_adapter/pool.hpp"

namespace spillover::torch_adapter {
namespace {

using c10::CachingAllocator::format_size;
using c10::cuda::CUDACachingAllocator::OutOfMemoryObserver;

template <class Observer>
struct ObserverList {
  std::mutex mutex;
  std::vector<Observer> list;  // guarded by mutex
};
using Observers = ObserverList<OutOfMemoryObserver>;
using RejectionObservers = ObserverList<RejectionObserver>;

Observers& observers() {
  // Leaked on purpose: observers hold Python objects, which must not be released after Python.
  static Observers* const instance = new Observers;
  return *instance;
}

RejectionObservers& rejection_observers() {
  static RejectionObservers* const instance = new RejectionObservers;
  return *instance;
}

// A copy, so that no lock is held while an observer takes the GIL.
template <class Observers>
auto observers_of(Observers& all) {
  const std::lock_guard lock(all.mutex);
  return all.list;
}

struct Failure {
  spillover_out_of_memory_t figures{};
  std::string message;
};

// With a reason, and where the failure was another's than the pool's (its last error is its text),
// the sizes at least.
Failure describe_failure(c10::DeviceIndex device, size_t size_bytes, std::string reason) {
  Failure failure;
  spillover_out_of_memory_t& figures = failure.figures;
  if (reason.empty()) {
    reason = last_pool_error();
    if (spillover_last_out_of_memory(&figures) == SPILLOVER_OK) {
      failure.message = figures.text;
      return failure;
    }
  }
  const c10::DeviceGuard guard(cuda_device(device));
  if (cudaMemGetInfo(&figures.free_bytes, &figures.total_bytes) != cudaSuccess) {
    // The report goes on without these two figures; the error must not reach the next CUDA call.
    (void)cudaGetLastError();
  }
  const spillover_stats_t stats = pool_stats(device);
  figures.limit_bytes = pool_limit_bytes(device);
  figures.allocated_bytes = static_cast<size_t>(stats.allocated_bytes[SPILLOVER_CLASS_ALL].current);
  figures.reserved_bytes = static_cast<size_t>(stats.reserved_bytes[SPILLOVER_CLASS_ALL].current);
  failure.message = "CUDA out of memory. Tried to allocate " + format_size(size_bytes) + ". GPU " +
                    std::to_string(static_cast<int>(device)) + " has a total capacity of " +
                    format_size(figures.total_bytes) + " of which " +
                    format_size(figures.free_bytes) + " is free. " + reason;
  return failure;
}

}  // namespace

void attach_out_of_memory_observer(OutOfMemoryObserver observer) {
  Observers& all = observers();
  const std::lock_guard lock(all.mutex);
  all.list.push_back(std::move(observer));
}

void attach_rejection_observer(RejectionObserver observer) {
  RejectionObservers& all = rejection_observers();
  const std::lock_guard lock(all.mutex);
  all.list.push_back(std::move(observer));
}

bool run_free_memory_callbacks() {
  bool freed = false;
  for (const auto& name : c10::FreeCudaMemoryCallbacksRegistry()->Keys()) {
    freed |= c10::FreeCudaMemoryCallbacksRegistry()->Create(name)->Execute();
  }
  return freed;
}

void throw_out_of_memory(c10::DeviceIndex device, size_t size_bytes, cudaStream_t stream,
                         const std::string& reason) {
  // What follows may call the pool, whose texts are valid until then.
  const Failure failure = describe_failure(device, size_bytes, reason);
  const spillover_out_of_memory_t& figures = failure.figures;
  c10::reportOutOfMemoryToProfiler(static_cast<int64_t>(size_bytes), figures.allocated_bytes,
                                   figures.reserved_bytes, cuda_device(device));
  History::instance().on_out_of_memory(device, size_bytes, figures.free_bytes, stream);

  const size_t allowed = std::min(figures.total_bytes, figures.limit_bytes);
  if (figures.is_limited != 0) {
    for (const auto& observer : observers_of(rejection_observers())) {
      try {
        observer(device, size_bytes, figures.allocated_bytes, figures.total_bytes);
      } catch (const std::exception& error) {  // torch's own allocator only warns of it, too.
        TORCH_WARN("an observer of refused requests failed: ", error.what());
      }
    }
  }
  for (const auto& observer : observers_of(observers())) {
    observer(device, size_bytes, allowed, figures.free_bytes);
  }

  TORCH_CHECK_WITH(OutOfMemoryError, false, failure.message);
  std::abort();  // Not reached: the check always throws; it tells the compiler so.
}

}  // namespace spillover::torch_adapter
