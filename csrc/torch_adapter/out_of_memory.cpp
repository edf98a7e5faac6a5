#include "torch_adapter/out_of_memory.hpp"

#include <c10/core/DeviceGuard.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <mutex>
#include <sstream>
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

// The sizes at least, where the failure was another's than the pool's (its last error is its text).
spillover_out_of_memory_t figures_of(c10::DeviceIndex device, size_t size_bytes,
                                     const std::string& reason) {
  spillover_out_of_memory_t figures{};
  if (spillover_last_out_of_memory(&figures) == SPILLOVER_OK) return figures;
  const c10::DeviceGuard guard(cuda_device(device));
  figures.requested_bytes = size_bytes;
  if (cudaMemGetInfo(&figures.free_bytes, &figures.total_bytes) != cudaSuccess) {
    // The report goes on without these two figures; the error must not reach the next CUDA call.
    (void)cudaGetLastError();
  }
  const spillover_stats_t stats = pool_stats(device);
  figures.limit_bytes = pool_limit_bytes(device);
  figures.allocated_bytes = static_cast<size_t>(stats.allocated_bytes[SPILLOVER_CLASS_ALL].current);
  figures.reserved_bytes = static_cast<size_t>(stats.reserved_bytes[SPILLOVER_CLASS_ALL].current);
  figures.details = reason.c_str();
  return figures;
}

// It begins with torch's own words, which programs look for.
std::string describe(c10::DeviceIndex device, const spillover_out_of_memory_t& figures) {
  const size_t unallocated =
      figures.reserved_bytes - std::min(figures.reserved_bytes, figures.allocated_bytes);
  const size_t known = figures.free_bytes + figures.reserved_bytes;
  std::ostringstream text;
  text << "CUDA out of memory. Tried to allocate " << format_size(figures.requested_bytes)
       << ". GPU " << static_cast<int>(device) << " has a total capacity of "
       << format_size(figures.total_bytes) << " of which " << format_size(figures.free_bytes)
       << " is free.";
  if (figures.limit_bytes < figures.total_bytes) {
    text << " This process may use " << format_size(figures.limit_bytes) << " of it.";
  }
  text << " Spillover's pool holds " << format_size(figures.reserved_bytes)
       << ", other memory of this and other processes is "
       << format_size(figures.total_bytes - std::min(figures.total_bytes, known))
       << ". Of the pool's memory " << format_size(figures.allocated_bytes)
       << " is allocated by PyTorch, and " << format_size(unallocated)
       << " is reserved by PyTorch but unallocated";
  if (unallocated > 0) {
    text << ": " << format_size(figures.waiting_bytes) << " is freed and still used by streams, "
         << format_size(figures.cached_bytes) << " is free; the largest free block has "
         << format_size(figures.largest_free_bytes) << " ("
         << std::lround(100.0 * figures.fragmentation) << " % fragmented)";
  }
  text << ". " << figures.details;
  return text.str();
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
                         c10::MempoolId_t pool) {
  const std::string reason = last_pool_error();
  // What follows may call the pool, whose details are valid until then.
  spillover_out_of_memory_t figures = figures_of(device, size_bytes, reason);
  const std::string details = figures.details;
  figures.details = details.c_str();
  const std::string message = describe(device, figures);
  c10::reportOutOfMemoryToProfiler(static_cast<int64_t>(size_bytes), figures.allocated_bytes,
                                   figures.reserved_bytes, cuda_device(device));
  History::instance().on_out_of_memory(device, size_bytes, figures.free_bytes, stream, pool);

  const size_t allowed = std::min(figures.total_bytes, figures.limit_bytes);
  if (figures.is_limited != 0) {
    for (const auto& observer : observers_of(rejection_observers())) {
      observer(device, size_bytes, figures.allocated_bytes, allowed);
    }
  }
  for (const auto& observer : observers_of(observers())) {
    observer(device, size_bytes, allowed, figures.free_bytes);
  }

  TORCH_CHECK_WITH(OutOfMemoryError, false, message);
  std::abort();  // Not reached: the check always throws; it tells the compiler so.
}

}  // namespace spillover::torch_adapter
