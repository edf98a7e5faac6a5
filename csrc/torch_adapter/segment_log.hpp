// What the pool has mapped and unmapped since the last look, for the allocation history.
//
// The pool does not report its segments as they come and go. Its totals of bytes and segments only
// ever grow, so that they tell whether anything happened; if so, the mapped ranges are compared
// with those of the last look. What was mapped and unmapped again in between is not seen.
//
// Any thread may call any function; none may be called with a lock that is held over calls of the
// pool. The GIL is given up (Note [GIL]).
#pragma once

#include <c10/core/Device.h>
#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

namespace spillover::torch_adapter {

class SegmentLog {
 public:
  struct Range {
    uintptr_t begin = 0;
    uintptr_t end = 0;
    cudaStream_t stream = nullptr;
    uint32_t arena = 0;
  };
  struct Changes {
    std::vector<Range> unmapped;
    std::vector<Range> mapped;
  };

  // Begins from what is mapped now.
  void start(int device_count);

  // What is different from the last look at a device, or from start.
  Changes changes(c10::DeviceIndex device);

 private:
  using Totals = std::array<int64_t, 4>;
  struct Seen {
    Totals totals{};
    std::vector<Range> ranges;  // sorted and disjoint
  };

  static Totals totals(c10::DeviceIndex device);
  static Seen look(c10::DeviceIndex device);

  std::mutex mutex_;        // Before the pool's.
  std::vector<Seen> seen_;  // one a device; guarded by mutex_
};

}  // namespace spillover::torch_adapter
