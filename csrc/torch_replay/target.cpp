// The allocator that torch uses in this process, as a target of replays: its own, or whichever took
// its place. C interface of the compiled part, for ctypes; torch's CUDA must be initialised.
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>

#include <cstdint>
#include <exception>
#include <string>

#include "replay/c_api.h"
#include "replay/timed_threads.hpp"

namespace spillover::torch_replay {
namespace {

namespace cuda_allocator = c10::cuda::CUDACachingAllocator;

thread_local std::string last_target_error;

// body() -> void; what it throws becomes the thread's last error.
template <typename Body>
int guarded_target(Body&& body) noexcept {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    last_target_error = error.what();
    return 1;
  }
}

int torch_allocate(std::size_t size_bytes, void* stream, void** out) {
  return guarded_target([&] {
    *out = cuda_allocator::raw_alloc_with_stream(size_bytes, static_cast<cudaStream_t>(stream));
  });
}

int torch_free(void* pointer) {
  return guarded_target([&] { cuda_allocator::raw_delete(pointer); });
}

int torch_record_stream(void* pointer, void* stream) {
  return guarded_target([&] {
    if (pointer == nullptr) return;
    const auto device = c10::cuda::current_device();
    // recordStream knows a block of its own by its deleter. The block is not this pointer's to
    // free.
    c10::DataPtr block(pointer, pointer, cuda_allocator::get()->raw_deleter(),
                       c10::Device(c10::DeviceType::CUDA, device));
    cuda_allocator::recordStream(
        block, c10::cuda::getStreamFromExternal(static_cast<cudaStream_t>(stream), device));
    block.release_context();
  });
}

std::size_t torch_reserved_bytes() {
  std::int64_t reserved = 0;
  guarded_target([&] {
    const auto stats = cuda_allocator::getDeviceStats(c10::cuda::current_device());
    reserved = stats.reserved_bytes[0].current;
  });
  return static_cast<std::size_t>(reserved);
}

constexpr spillover_replay_target kTorchTarget = {
    .allocate = torch_allocate,
    .free = torch_free,
    .record_stream = torch_record_stream,
    .reserved_bytes = torch_reserved_bytes,
    .last_error = [] { return last_target_error.c_str(); },
};

}  // namespace
}  // namespace spillover::torch_replay

extern "C" {

const spillover_replay_target* spillover_torch_replay_target() {
  return &spillover::torch_replay::kTorchTarget;
}

// As spillover_replay_pairs, through the interface that tensors use: allocate() and the destructor
// of what it returns.
uint64_t spillover_torch_replay_pairs(size_t size_bytes, size_t thread_count, size_t pair_count) {
  c10::Allocator* const allocator = c10::cuda::CUDACachingAllocator::get();
  const auto run = [&](std::size_t count) {
    return spillover::torch_replay::guarded_target([&] {
             for (std::size_t i = 0; i < count; ++i) {
               const c10::DataPtr block = allocator->allocate(size_bytes);
             }
           }) == 0;
  };
  const std::size_t warm_up_count = pair_count / 16 + 1;
  return spillover::run_timed(
      thread_count, [&] { return run(warm_up_count); }, [&] { return run(pair_count); });
}

}  // extern "C"
