#include "emulator/aten/dry_recorder.hpp"

#include <c10/cuda/CUDACachingAllocator.h>
#include <torch/csrc/autograd/function.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <map>
#include <mutex>
#include <vector>

#include "emulator/aten/dry_run.hpp"
#include "emulator/aten/forward_lines.hpp"
#include "emulator/aten/operator_kernel.hpp"
#include "emulator/aten/workspace.hpp"
#include "emulator/core/dry_api.h"

namespace spillover::emulator {
namespace {

using c10::cuda::CUDACachingAllocator::TraceEntry;
using Block = spillover_emulator_block;

// The numbers that Python uses (_dry_records.py).
constexpr int kUntagged = 0;
constexpr int kWorkspace = 5;
constexpr int kBackwardPhase = 1;

// The caching allocator hands out multiples of this.
constexpr uint64_t kRoundBytes = 512;

struct DeviceRecord {
  std::map<uintptr_t, Block> live;
  std::vector<Block> freed_since_peak;
  uint64_t live_bytes = 0;
  uint64_t peak_bytes = 0;
  uint64_t peak_number = 0;
  bool is_frozen = false;
};

// Called with the lock of torch's allocator held; takes no other lock than its own.
class Recorder {
 public:
  static Recorder& instance() {
    static auto* const recorder = new Recorder();
    return *recorder;
  }

  void begin(int index, uintptr_t address, uint64_t size_bytes) {
    Block block{};
    block.size_bytes = (size_bytes + kRoundBytes - 1) / kRoundBytes * kRoundBytes;
    block.site = spillover_emulator_take_site();
    block.step = step_.load(std::memory_order_relaxed);
    const auto node = torch::autograd::get_current_node();
    block.phase = node ? kBackwardPhase : phase_.load(std::memory_order_relaxed);
    if (node && block.site == 0) block.forward_site = forward_site(*node);
    block.kind = allocates_workspace() ? kWorkspace : kUntagged;
    block.operator_name = DeviceWorkScope::is_active() ? last_dry_operator() : nullptr;
    const std::lock_guard<std::mutex> guard(mutex_);
    block.number = ++last_number_;
    DeviceRecord& device = device_at(index);
    device.live.insert_or_assign(address, block);
    device.live_bytes += block.size_bytes;
    if (device.is_frozen || device.live_bytes <= device.peak_bytes) return;
    device.peak_bytes = device.live_bytes;
    device.peak_number = block.number;
    device.freed_since_peak.clear();
  }

  void end(int index, uintptr_t address) {
    const std::lock_guard<std::mutex> guard(mutex_);
    DeviceRecord& device = device_at(index);
    const auto found = device.live.find(address);
    if (found == device.live.end()) return;
    device.live_bytes -= found->second.size_bytes;
    if (found->second.number <= device.peak_number) {
      device.freed_since_peak.push_back(found->second);
    }
    device.live.erase(found);
  }

  void set_phase(int phase, unsigned step) {
    phase_.store(phase, std::memory_order_relaxed);
    step_.store(step, std::memory_order_relaxed);
  }

  void tag(int index, uintptr_t address, int kind) {
    const std::lock_guard<std::mutex> guard(mutex_);
    DeviceRecord& device = device_at(index);
    auto found = device.live.upper_bound(address);
    if (found == device.live.begin()) return;
    --found;
    if (address - found->first < found->second.size_bytes) found->second.kind = kind;
  }

  void freeze(int index) {
    const std::lock_guard<std::mutex> guard(mutex_);
    DeviceRecord& device = device_at(index);
    if (device.is_frozen) return;
    device.is_frozen = true;
    device.peak_bytes = device.live_bytes;
    device.peak_number = last_number_;
    device.freed_since_peak.clear();
  }

  size_t peak(int index, Block* out, size_t capacity) {
    const std::lock_guard<std::mutex> guard(mutex_);
    const DeviceRecord& device = device_at(index);
    size_t count = 0;
    const auto add = [&](const Block& block) {
      if (count < capacity) out[count] = block;
      ++count;
    };
    for (const auto& [address, block] : device.live) {
      if (block.number <= device.peak_number) add(block);
    }
    for (const Block& block : device.freed_since_peak) add(block);
    return count;
  }

 private:
  DeviceRecord& device_at(int index) { return devices_.at(static_cast<size_t>(index)); }

  std::mutex mutex_;
  std::array<DeviceRecord, C10_COMPILE_TIME_MAX_GPUS> devices_;  // guarded by mutex_
  uint64_t last_number_ = 0;                                     // guarded by mutex_
  std::atomic<int> phase_{0};
  std::atomic<unsigned> step_{1};
};

void record_block(const TraceEntry& entry) {
  const auto address = static_cast<uintptr_t>(entry.addr_);
  if (entry.action_ == TraceEntry::ALLOC) {
    Recorder::instance().begin(entry.device_, address, entry.size_);
  } else if (entry.action_ == TraceEntry::FREE_REQUESTED) {
    Recorder::instance().end(entry.device_, address);
  }
}

}  // namespace
}  // namespace spillover::emulator

using spillover::emulator::Recorder;

extern "C" {

__attribute__((visibility("default"))) int spillover_emulator_recorder_start() noexcept {
  try {
    c10::cuda::CUDACachingAllocator::attachAllocatorTraceTracker(
        &spillover::emulator::record_block);
    spillover::emulator::follow_forward_lines();
    return 0;
  } catch (const std::exception&) {
    return -1;
  }
}

__attribute__((visibility("default"))) void spillover_emulator_recorder_phase(
    int phase, unsigned step) noexcept {
  Recorder::instance().set_phase(phase, step);
}

__attribute__((visibility("default"))) void spillover_emulator_recorder_tag(int device,
                                                                            const void* address,
                                                                            int kind) noexcept {
  Recorder::instance().tag(device, reinterpret_cast<uintptr_t>(address), kind);
}

__attribute__((visibility("default"))) int spillover_emulator_recorder_freeze(int device) noexcept {
  if (spillover::emulator::allocates_optional_workspace()) return 0;
  Recorder::instance().freeze(device);
  return 1;
}

__attribute__((visibility("default"))) size_t spillover_emulator_recorder_peak(
    int device, spillover_emulator_block* out, size_t capacity) noexcept {
  return Recorder::instance().peak(device, out, capacity);
}

}  // extern "C"
