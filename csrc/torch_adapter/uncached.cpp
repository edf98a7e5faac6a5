#include "torch_adapter/uncached.hpp"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include <atomic>
#include <cstdio>
#include <mutex>
#include <string>
#include <unordered_set>

#include "torch_adapter/gil.hpp"
#include "torch_adapter/out_of_memory.hpp"
#include "torch_adapter/pool.hpp"

namespace spillover::torch_adapter {
namespace {

struct Uncached {
  std::atomic<size_t> count{0};  // of blocks; written under the mutex
  std::mutex mutex;
  std::unordered_set<const void*> blocks;  // guarded by mutex
};

Uncached& uncached() {
  // Leaked on purpose: blocks are freed after every destructor that could run.
  static Uncached* const instance = new Uncached;
  return *instance;
}

// Null where the driver has no memory left.
void* try_cuda_malloc(c10::DeviceIndex device, size_t size_bytes) {
  const c10::cuda::CUDAGuard guard(device);
  void* pointer = nullptr;
  const cudaError_t error = without_gil([&] { return cudaMalloc(&pointer, size_bytes); });
  if (error == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();  // The sticky error must not reach the next CUDA call.
    return nullptr;
  }
  C10_CUDA_CHECK(error);
  return pointer;
}

bool forget(const void* pointer) {
  Uncached& all = uncached();
  const std::lock_guard lock(all.mutex);
  if (all.blocks.erase(pointer) == 0) return false;
  all.count.store(all.blocks.size(), std::memory_order_relaxed);
  return true;
}

}  // namespace

void* allocate_uncached(c10::DeviceIndex device, size_t size_bytes, cudaStream_t stream) {
  void* pointer = try_cuda_malloc(device, size_bytes);
  if (pointer == nullptr) {
    check_pool(without_gil([&] { return spillover_trim(device, 0); }), "giving idle memory back");
    without_gil(run_free_memory_callbacks);
    pointer = try_cuda_malloc(device, size_bytes);
  }
  if (pointer == nullptr) {
    throw_out_of_memory(device, size_bytes, stream,
                        "The driver has no memory left, and torch's caching is switched off "
                        "(caching_allocator_enable, PYTORCH_NO_CUDA_MEMORY_CACHING), which keeps "
                        "the pool from serving the request.");
  }
  Uncached& all = uncached();
  const std::lock_guard lock(all.mutex);
  all.blocks.insert(pointer);
  all.count.store(all.blocks.size(), std::memory_order_relaxed);
  return pointer;
}

bool is_uncached(const void* pointer) noexcept {
  Uncached& all = uncached();
  if (all.count.load(std::memory_order_relaxed) == 0) return false;
  const std::lock_guard lock(all.mutex);
  return all.blocks.count(pointer) != 0;
}

bool free_uncached(void* pointer) noexcept {
  if (uncached().count.load(std::memory_order_relaxed) == 0) return false;
  // The mutex may be held for ever there.
  if (spillover_in_forked_child() != 0) return true;
  // First: as soon as it is free, its address may be that of another block.
  if (!forget(pointer)) return false;
  const cudaError_t error = without_gil([&] { return cudaFree(pointer); });
  if (error != cudaSuccess && error != cudaErrorCudartUnloading) {
    (void)cudaGetLastError();
    std::fprintf(stderr, "spillover: freeing device memory at %p failed: %s\n", pointer,
                 cudaGetErrorString(error));
  }
  return true;
}

}  // namespace spillover::torch_adapter
