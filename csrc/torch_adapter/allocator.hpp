// torch's CUDA allocator over Spillover's pool: a subclass of c10's CUDAAllocator that calls the
// pool's C interface, and the only product code that includes torch's headers.
//
// One instance lives as long as the process (see instance()). torch calls it from any thread, with
// or without Python's GIL (see Note [GIL]). It keeps no memory of its own: statistics, snapshots
// and limits all come from the pool, which other users of libspillover.so share.
//
// Note [Versions]: c10's class changes between torch's minor versions, hence one build for each.
// What is new since 2.12 is behind SPILLOVER_TORCH_AT_LEAST; functions that later versions added
// with a body of their own are inherited, so that 2.11 to 2.14 compile from this one text.
#pragma once

#include <c10/cuda/CUDACachingAllocator.h>

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "torch_adapter/torch_version.hpp"

namespace spillover::torch_adapter {

namespace cuda_allocator = c10::cuda::CUDACachingAllocator;

class Allocator final : public cuda_allocator::CUDAAllocator {
 public:
  // The process's only instance. Never destroyed: tensors with static storage duration are freed
  // after every destructor that could run.
  static Allocator& instance();

  // Memory.
  c10::DataPtr allocate(size_t size_bytes) override;
#if SPILLOVER_TORCH_AT_LEAST(2, 14)
  c10::DataPtr allocateWithAddress(size_t size_bytes, void* address) override;
#endif
  c10::DeleterFnPtr raw_deleter() const override;
  void* raw_alloc(size_t size_bytes) override;
  void* raw_alloc_with_stream(size_t size_bytes, cudaStream_t stream) override;
  void raw_delete(void* pointer) override;
  void copy_data(void* destination, const void* source, size_t size_bytes) const override;
  using CUDAAllocator::recordStream;
  void recordStream(const c10::DataPtr& data, c10::cuda::CUDAStream stream) override;
  void* getBaseAllocation(void* pointer, size_t* size_bytes) override;

  // State and limits.
  void init(int device_count) override;
  bool initialized() override;
  void enable(bool value) override;
  bool isEnabled() const override;
  double getMemoryFraction(c10::DeviceIndex device) override;
  void setMemoryFraction(double fraction, c10::DeviceIndex device) override;
  void emptyCache(c10::MempoolId_t pool = {0, 0}) override;
  void cacheInfo(c10::DeviceIndex device, size_t* largest_block) override;
  std::vector<cuda_allocator::StreamSegmentSize> getExpandableSegmentSizes(
      c10::DeviceIndex device) override;
  std::string name() override;

  // Statistics and history.
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override;
  void resetAccumulatedStats(c10::DeviceIndex device) override;
  void resetPeakStats(c10::DeviceIndex device) override;
  cuda_allocator::SnapshotInfo snapshot(c10::MempoolId_t pool = {0, 0},
                                        bool include_traces = true) override;
  bool isHistoryEnabled() override;
  void recordHistory(bool enabled, cuda_allocator::CreateContextFn context_recorder,
                     size_t entries_max, cuda_allocator::RecordContext when, bool clear_history,
                     const std::vector<std::string>& skip_actions) override;
  void recordAnnotation(const std::vector<std::pair<std::string, std::string>>& fields) override;
  void attachOutOfMemoryObserver(cuda_allocator::OutOfMemoryObserver observer) override;
  void attachAllocatorTraceTracker(cuda_allocator::AllocatorTraceTracker tracker) override;
#if SPILLOVER_TORCH_AT_LEAST(2, 12)
  void attachOomRejectionObserver(cuda_allocator::OomRejectionObserver observer) override;
  std::shared_ptr<c10::GatheredContext> getContextForPointer(const void* pointer) override;
#endif
  void pushCompileContext(std::string& context) override;
  void popCompileContext() override;
  void setUserMetadata(const std::string& metadata) override;
  std::string getUserMetadata() override;
#if SPILLOVER_TORCH_AT_LEAST(2, 14)
  bool supportsUserMetadata() override;
  void annotateMemory(const void* pointer, const std::string& metadata) override;
#endif

  // Private pools.
  void beginAllocateToPool(c10::DeviceIndex device, c10::MempoolId_t pool,
                           std::function<bool(cudaStream_t)> filter) override;
  void endAllocateToPool(c10::DeviceIndex device, c10::MempoolId_t pool) override;
  void releasePool(c10::DeviceIndex device, c10::MempoolId_t pool) override;
  int getPoolUseCount(c10::DeviceIndex device, c10::MempoolId_t pool) override;
  void createOrIncrefPool(c10::DeviceIndex device, c10::MempoolId_t pool,
                          std::shared_ptr<CUDAAllocator> allocator) override;
  void setUseOnOOM(c10::DeviceIndex device, c10::MempoolId_t pool, bool use_on_oom) override;
  void setNoSplit(c10::DeviceIndex device, c10::MempoolId_t pool) override;
  bool checkPoolLiveAllocations(c10::DeviceIndex device, c10::MempoolId_t pool,
                                const std::unordered_set<void*>& expected) override;

  // Several devices.
  void enablePeerAccess(c10::DeviceIndex device, c10::DeviceIndex device_to_access) override;
  cudaError_t memcpyAsync(void* destination, int destination_device, const void* source,
                          int source_device, size_t size_bytes, cudaStream_t stream,
                          bool p2p_enabled) override;

  // checkpoints.cpp
  std::shared_ptr<cuda_allocator::AllocatorState> getCheckpointState(
      c10::DeviceIndex device, c10::MempoolId_t pool) override;
  cuda_allocator::CheckpointDelta setCheckpointPoolState(
      c10::DeviceIndex device, std::shared_ptr<cuda_allocator::AllocatorState> state) override;

  // ipc.cpp: sharing with other processes. Base class functions that raise by themselves are
  // inherited.
  cuda_allocator::ShareableHandle shareIpcHandle(void* pointer) override;
  std::shared_ptr<void> getIpcDevPtr(std::string handle) override;

 private:
  Allocator() = default;
  void* allocate_block(c10::DeviceIndex device, size_t size_bytes, cudaStream_t stream);

  std::atomic<int> device_count_{0};  // 0 until torch has initialised CUDA
};

}  // namespace spillover::torch_adapter
