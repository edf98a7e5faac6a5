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

struct Observers {
  std::mutex mutex;
  std::vector<OutOfMemoryObserver> list;  // guarded by mutex
};

Observers& observers() {
  // Leaked on purpose: observers hold Python objects, which must not be released after Python.
  static Observers* const instance = new Observers;
  return *instance;
}

struct DeviceMemory {
  size_t free_bytes = 0;
  size_t total_bytes = 0;
};

DeviceMemory device_memory(c10::DeviceIndex device) {
  const c10::DeviceGuard guard(cuda_device(device));
  DeviceMemory memory;
  if (cudaMemGetInfo(&memory.free_bytes, &memory.total_bytes) != cudaSuccess) {
    // The report goes on without these two figures; the error must not reach the next CUDA call.
    (void)cudaGetLastError();
  }
  return memory;
}

// The setting that would help, or "" where none would.
std::string advice(size_t size_bytes, size_t unallocated_bytes, bool is_limited) {
  if (is_limited) {
    return "";  // The pool's own reason names the limit and how to raise it.
  }
  if (unallocated_bytes >= size_bytes) {
    return " Enough memory is free but not in one piece: torch.cuda.empty_cache() gives unused "
           "segments back, and allocating the largest tensors first fragments less.";
  }
  return " spillover.offload_activations, spillover.optim and spillover.stream_parameters move "
         "activations, optimizer state and parameters off the device.";
}

std::string describe(c10::DeviceIndex device, size_t size_bytes, const DeviceMemory& memory,
                     const std::string& reason) {
  const spillover_stats_t stats = pool_stats(device);
  const size_t allowed = pool_limit_bytes(device);
  const bool is_limited = allowed < memory.total_bytes;
  const auto allocated = static_cast<size_t>(stats.allocated_bytes[SPILLOVER_CLASS_ALL].current);
  const auto reserved = static_cast<size_t>(stats.reserved_bytes[SPILLOVER_CLASS_ALL].current);
  const size_t unallocated = reserved > allocated ? reserved - allocated : 0;
  const size_t largest = pool_largest_free_bytes(device);

  std::ostringstream text;
  text << "CUDA out of memory. Tried to allocate " << format_size(size_bytes) << ". GPU "
       << static_cast<int>(device) << " has a total capacity of " << format_size(memory.total_bytes)
       << " of which " << format_size(memory.free_bytes) << " is free.";
  if (is_limited) text << " This process may use " << format_size(allowed) << " of it.";
  text << " Of the memory that spillover's pool holds, " << format_size(allocated)
       << " is allocated by PyTorch, and " << format_size(unallocated)
       << " is reserved by PyTorch but unallocated";
  if (unallocated > 0) {
    const double outside = static_cast<double>(unallocated - std::min(largest, unallocated));
    text << "; the largest free block has " << format_size(largest) << " ("
         << std::lround(100.0 * outside / static_cast<double>(unallocated)) << " % fragmented)";
  }
  text << ". " << reason << advice(size_bytes, unallocated, is_limited);
  return text.str();
}

}  // namespace

void attach_out_of_memory_observer(OutOfMemoryObserver observer) {
  Observers& all = observers();
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

void throw_out_of_memory(c10::DeviceIndex device, size_t size_bytes, cudaStream_t stream) {
  const std::string reason = last_pool_error();
  const DeviceMemory memory = device_memory(device);
  const std::string message = describe(device, size_bytes, memory, reason);
  const spillover_stats_t stats = pool_stats(device);
  c10::reportOutOfMemoryToProfiler(
      static_cast<int64_t>(size_bytes),
      static_cast<size_t>(stats.allocated_bytes[SPILLOVER_CLASS_ALL].current),
      static_cast<size_t>(stats.reserved_bytes[SPILLOVER_CLASS_ALL].current), cuda_device(device));
  History::instance().on_out_of_memory(device, size_bytes, memory.free_bytes, stream);

  std::vector<OutOfMemoryObserver> list;
  {
    Observers& all = observers();
    const std::lock_guard lock(all.mutex);
    list = all.list;
  }
  const size_t allowed = std::min(memory.total_bytes, pool_limit_bytes(device));
  for (const auto& observer : list) observer(device, size_bytes, allowed, memory.free_bytes);

  TORCH_CHECK_WITH(OutOfMemoryError, false, message);
  std::abort();  // Not reached: the check always throws; it tells the compiler so.
}

}  // namespace spillover::torch_adapter
