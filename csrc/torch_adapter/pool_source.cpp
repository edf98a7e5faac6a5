#include "torch_adapter/pool_source.hpp"

#include <c10/cuda/CUDAGuard.h>
#include <c10/util/Exception.h>

#include <array>
#include <cstdio>
#include <exception>
#include <mutex>
#include <utility>

#include "torch_adapter/pool.hpp"

namespace spillover::torch_adapter {
namespace {

struct Source {
  c10::DeviceIndex device;
  PoolAllocator allocator;
};

// torch's own allocator holds its lock over these calls, so there are allocators that count on
// being called once at a time on a device. Recursive like that one: they may allocate memory
// themselves. Nobody who waits for it has the GIL or another lock. Leaked, as Sources may be.
std::recursive_mutex& mutex_of(c10::DeviceIndex device) {
  static auto& mutexes = *new std::array<std::recursive_mutex, C10_COMPILE_TIME_MAX_GPUS>;
  return mutexes.at(static_cast<size_t>(device));
}

// The pool's C interface takes no exceptions, so they wait here for the request to come back.
thread_local std::exception_ptr t_failure;

void* allocate_from(void* user, size_t size_bytes, void* stream) {
  const Source& source = *static_cast<Source*>(user);
  try {
    const std::lock_guard lock(mutex_of(source.device));
    const c10::cuda::CUDAGuard guard(source.device);
    return source.allocator->raw_alloc_with_stream(size_bytes, static_cast<cudaStream_t>(stream));
  } catch (const c10::OutOfMemoryError&) {
    return nullptr;  // The pool gives memory back and asks again.
  } catch (...) {
    t_failure = std::current_exception();
    return nullptr;
  }
}

void free_to(void* user, void* pointer, size_t size_bytes) {
  const Source& source = *static_cast<Source*>(user);
  try {
    const std::lock_guard lock(mutex_of(source.device));
    const c10::cuda::CUDAGuard guard(source.device);
    source.allocator->raw_delete(pointer);
  } catch (const std::exception& error) {
    std::fprintf(stderr,
                 "spillover: the allocator of a torch.cuda.MemPool failed to free %zu bytes at %p: "
                 "%s\n",
                 size_bytes, pointer, error.what());
  } catch (...) {
    std::fprintf(
        stderr, "spillover: the allocator of a torch.cuda.MemPool failed to free %zu bytes at %p\n",
        size_bytes, pointer);
  }
}

void drop(void* user) {
  delete static_cast<Source*>(user);
}

}  // namespace

uint32_t make_private_arena(c10::DeviceIndex device) {
  uint32_t arena = 0;
  check_pool(spillover_make_arena(device, &arena), "making a private memory pool");
  return arena;
}

uint32_t make_private_arena_from(c10::DeviceIndex device, PoolAllocator allocator) {
  auto source = std::make_unique<Source>(Source{device, std::move(allocator)});
  uint32_t arena = 0;
  check_pool(
      spillover_make_arena_from(device, &allocate_from, &free_to, &drop, source.get(), &arena),
      "making a private memory pool with an allocator of its own");
  static_cast<void>(source.release());  // drop() deletes it.
  return arena;
}

void forget_source_failure() noexcept {
  t_failure = nullptr;
}

void rethrow_source_failure() {
  if (t_failure) std::rethrow_exception(std::exchange(t_failure, nullptr));
}

}  // namespace spillover::torch_adapter
