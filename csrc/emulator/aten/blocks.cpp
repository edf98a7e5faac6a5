// Tells the checker of the blocks that torch's own caching allocator hands out and takes back.
//
// Torch calls the tracker with the allocator's lock held; it calls no CUDA and takes no other lock
// than the checker's.
#include <c10/cuda/CUDACachingAllocator.h>

#include <cstdint>

#include "emulator/core/c_api.h"

namespace spillover::emulator {
namespace {

using c10::cuda::CUDACachingAllocator::TraceEntry;

// Pools are pairs of numbers of which one is 0: torch counts those of captures and others apart.
uint64_t pool_of(const TraceEntry& entry) {
  const auto& [of_capture, of_user] = entry.mempool_;
  return of_capture != 0 ? 2 * of_capture : (of_user != 0 ? 2 * of_user + 1 : 0);
}

void follow(const TraceEntry& entry) {
  const auto* const pointer = reinterpret_cast<const void*>(static_cast<uintptr_t>(entry.addr_));
  if (entry.action_ == TraceEntry::ALLOC) {
    spillover_emulator_block_begin(pointer, entry.size_, pool_of(entry));
  } else if (entry.action_ == TraceEntry::FREE_REQUESTED) {
    spillover_emulator_block_end(pointer, entry.size_);
  }
}

}  // namespace
}  // namespace spillover::emulator

// Called once torch has set its allocator up; 0, or -1 where the allocator offers no trackers.
extern "C" __attribute__((visibility("default"))) int spillover_emulator_aten_follow_blocks() {
  try {
    c10::cuda::CUDACachingAllocator::attachAllocatorTraceTracker(&spillover::emulator::follow);
    return 0;
  } catch (const std::exception&) {
    return -1;
  }
}
