// Checkpoints of private pools: which blocks were live, to be restored at their addresses. torch's
// CUDA graph trees record graphs that may follow the same one from the same state.
#include <c10/util/Exception.h>

#include <utility>
#include <vector>

#include "torch_adapter/allocator.hpp"
#include "torch_adapter/gil.hpp"
#include "torch_adapter/history.hpp"
#include "torch_adapter/pool.hpp"
#include "torch_adapter/private_pools.hpp"
#include "torch_adapter/snapshot.hpp"

namespace spillover::torch_adapter {
namespace {

struct Checkpoint final : cuda_allocator::AllocatorState {
  uint32_t arena = 0;
  std::vector<LiveBlock> blocks;
};

}  // namespace

std::shared_ptr<cuda_allocator::AllocatorState> Allocator::getCheckpointState(
    c10::DeviceIndex device, c10::MempoolId_t pool) {
  const auto arena = PrivatePools::instance().arena_of(device, pool);
  TORCH_CHECK(arena, "Could not find pool of id (", pool.first, ", ", pool.second, ")");
  auto checkpoint = std::make_shared<Checkpoint>();
  checkpoint->arena = *arena;
  checkpoint->blocks = live_blocks(device, *arena);
  return checkpoint;
}

cuda_allocator::CheckpointDelta Allocator::setCheckpointPoolState(
    c10::DeviceIndex device, std::shared_ptr<cuda_allocator::AllocatorState> state) {
  const auto checkpoint = std::dynamic_pointer_cast<Checkpoint>(state);
  TORCH_CHECK(checkpoint != nullptr, "spillover: this is no checkpoint of spillover's pool");
  cuda_allocator::CheckpointDelta delta;
  for (const LiveBlock& block : live_blocks(device, checkpoint->arena)) {
    delta.ptrs_freed.push_back(block.info.address);
  }
  std::vector<spillover_block_info> wanted;
  wanted.reserve(checkpoint->blocks.size());
  for (const LiveBlock& block : checkpoint->blocks) wanted.push_back(block.info);
  check_pool(without_gil([&] {
               return spillover_restore_arena(device, checkpoint->arena, wanted.data(),
                                              wanted.size());
             }),
             "restoring a checkpoint of a private memory pool");
  History& history = History::instance();
  if (history.watching()) {
    for (void* pointer : delta.ptrs_freed) history.on_free(pointer);
  }
  for (const LiveBlock& block : checkpoint->blocks) {
    void* pointer = block.info.address;
    if (history.watching()) {
      history.on_alloc(device, pointer, block.info.requested_bytes, block.stream,
                       PrivatePools::instance().id_of(device, checkpoint->arena));
    }
    delta.dataptrs_allocd.emplace_back(pointer, pointer, raw_deleter(), cuda_device(device));
  }
  return delta;
}

}  // namespace spillover::torch_adapter
