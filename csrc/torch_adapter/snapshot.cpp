#include "torch_adapter/snapshot.hpp"

#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "torch_adapter/history.hpp"
#include "torch_adapter/pool.hpp"
#include "torch_adapter/private_pools.hpp"

namespace spillover::torch_adapter {
namespace {

using c10::CachingDeviceAllocator::BlockInfo;
using c10::CachingDeviceAllocator::SegmentInfo;
using c10::cuda::CUDACachingAllocator::AllocatorConfigInfo;
using c10::cuda::CUDACachingAllocator::SnapshotInfo;

constexpr int kLive = 1;
constexpr int kFree = 0;

BlockInfo to_block(const spillover_block_info& block) {
  BlockInfo info;
  info.size = block.size_bytes;
  info.requested_size = block.requested_bytes;
  info.allocated = block.state == kLive;
  info.active = block.state != kFree;
  return info;
}

SegmentInfo to_segment(c10::DeviceIndex device, const spillover_segment_info& segment,
                       const spillover_block_info* blocks) {
  SegmentInfo info;
  info.device = device;
  info.address = reinterpret_cast<size_t>(segment.address);
  info.total_size = segment.size_bytes;
  info.stream = static_cast<cudaStream_t>(segment.stream);
  info.is_large = segment.is_small == 0;
  info.is_expandable = segment.is_fixed == 0;
  info.blocks.reserve(segment.block_count);
  for (size_t i = 0; i < segment.block_count; ++i) {
    const BlockInfo block = to_block(blocks[i]);
    if (block.allocated) info.allocated_size += block.size;
    if (block.active) {
      info.active_size += block.size;
      info.requested_size += block.requested_size;
    }
    info.blocks.push_back(block);
  }
  return info;
}

struct Walk {
  c10::DeviceIndex device;
  std::vector<SegmentInfo>* segments;
  std::vector<uint32_t> arenas;  // of the segments
};

void visit(void* user, const spillover_segment_info* segment, const spillover_block_info* blocks) {
  auto& walk = *static_cast<Walk*>(user);
  walk.segments->push_back(to_segment(walk.device, *segment, blocks));
  walk.arenas.push_back(segment->tag);
}

struct LiveWalk {
  uint32_t arena;
  std::vector<LiveBlock> live;
};

void visit_live(void* user, const spillover_segment_info* segment,
                const spillover_block_info* blocks) {
  auto& walk = *static_cast<LiveWalk*>(user);
  if (segment->tag != walk.arena) return;
  for (size_t i = 0; i < segment->block_count; ++i) {
    if (blocks[i].state != kLive) continue;
    walk.live.push_back({blocks[i], static_cast<cudaStream_t>(segment->stream)});
  }
}

// The pool has none of the native allocator's settings; these are the values that say so.
AllocatorConfigInfo native_settings() {
  AllocatorConfigInfo config{};
  config.max_split_size = std::numeric_limits<size_t>::max();
  return config;
}

}  // namespace

std::vector<LiveBlock> live_blocks(c10::DeviceIndex device, uint32_t arena) {
  LiveWalk walk{arena, {}};
  check_pool(without_gil([&] { return spillover_visit_segments(device, &visit_live, &walk); }),
             "looking for live blocks");
  return std::move(walk.live);
}

SnapshotInfo take_snapshot(int device_count, c10::MempoolId_t pool) {
  SnapshotInfo snapshot{};
  snapshot.config_metadata = native_settings();
  for (int device = 0; device < device_count; ++device) {
    std::vector<SegmentInfo> segments;
    Walk walk{static_cast<c10::DeviceIndex>(device), &segments, {}};
    check_pool(without_gil([&] { return spillover_visit_segments(device, &visit, &walk); }),
               "taking a snapshot");
    for (size_t i = 0; i < segments.size(); ++i) {
      segments[i].owner_private_pool_id =
          PrivatePools::instance().id_of(walk.device, walk.arenas[i]);
      if (pool != kNoPool && segments[i].owner_private_pool_id != pool) continue;
      snapshot.segments.push_back(std::move(segments[i]));
    }
  }
  // The pool is unlocked again, so History may take its own lock.
  for (auto& segment : snapshot.segments) {
    size_t address = segment.address;
    for (auto& block : segment.blocks) {
      if (block.allocated) {
        block.context_when_allocated =
            History::instance().context_of(reinterpret_cast<const void*>(address));
      }
      address += block.size;
    }
  }
  return snapshot;
}

}  // namespace spillover::torch_adapter
