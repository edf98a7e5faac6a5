// Blocks that torch shares with other processes. torch keeps a storage that it has sent until every
// receiver has let go of it, and tells the receivers' streams to wait for the sender's work by an
// event; so all that is left for the allocator is to name memory and to open it by that name.
#include <c10/cuda/CUDAFunctions.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdio>

#include "torch_adapter/allocator.hpp"
#include "torch_adapter/gil.hpp"
#include "torch_adapter/ipc_handle.hpp"
#include "torch_adapter/pool.hpp"

namespace spillover::torch_adapter {
namespace {

struct Shared {
  IpcHandle handle;
  size_t offset_bytes = 0;
};

void remember(void* user, const spillover_shared_block* block) {
  auto& shared = *static_cast<Shared*>(user);
  shared.offset_bytes = block->offset_bytes;
  shared.handle.process = block->process;
  shared.handle.chunks.assign(block->chunks, block->chunks + block->chunk_count);
  shared.handle.fixed.assign(std::begin(block->handle), std::end(block->handle));
}

// A deleter must not throw, and memory that stays mapped must not go unnoticed.
void close_shared(void* address) noexcept {
  if (without_gil([&] { return spillover_close_shared(address); }) == SPILLOVER_OK) return;
  std::fprintf(stderr, "spillover: closing another process's device memory at %p failed: %s\n",
               address, last_pool_error());
}

}  // namespace

cuda_allocator::ShareableHandle Allocator::shareIpcHandle(void* pointer) {
  Shared shared;
  check_pool(without_gil([&] { return spillover_share(pointer, &remember, &shared); }),
             "sharing a tensor with other processes");
  return {static_cast<ptrdiff_t>(shared.offset_bytes), encode(shared.handle)};
}

std::shared_ptr<void> Allocator::getIpcDevPtr(std::string handle) {
  const IpcHandle decoded = decode(handle);
  spillover_shared_block block{};
  block.process = decoded.process;
  block.chunk_count = decoded.chunks.size();
  block.chunks = decoded.chunks.data();
  std::copy(decoded.fixed.begin(), decoded.fixed.end(), block.handle);
  const c10::DeviceIndex device = c10::cuda::current_device();
  void* address = nullptr;
  check_pool(without_gil([&] { return spillover_open_shared(device, &block, &address); }),
             "opening a tensor of another process");
  return {address, &close_shared};
}

}  // namespace spillover::torch_adapter
