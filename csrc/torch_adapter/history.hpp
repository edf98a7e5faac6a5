// Allocation history: what torch.cuda.memory._record_memory_history, trace trackers and the
// profiler see of the pool.
//
// One instance serves all devices and lives as long as the process. Any thread may call any
// function. Contexts (stack traces) are gathered and dropped outside the lock, since that takes
// Python's GIL; trackers are called outside of it too.
//
// Events of segments come from the pool, with its lock held (on_segment()): trackers hear of memory
// as soon as it is there and before it goes, since NCCL's registers what it is told of. They may
// not call the allocator then, as c10 says of torch's own. Memory that is mapped is SEGMENT_MAP and
// SEGMENT_UNMAP; a chunk at a fixed address, as every one of a MemPool's own allocator, is
// SEGMENT_ALLOC and SEGMENT_FREE. For the history they wait until the thread has left the pool,
// where their context, a stack trace, can be gathered.
//
// Invariant: while watching, live_ has an entry for every block that torch holds. Blocks older than
// the watch are entered when it begins, without a context.
#pragma once

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/util/ApproximateClock.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "allocator/c_api.h"

namespace spillover::torch_adapter {

// The pool that ordinary allocations come from, in torch's numbering.
inline constexpr c10::MempoolId_t kNoPool{0, 0};

class History {
 public:
  using Context = std::shared_ptr<c10::GatheredContext>;
  using CreateContext = c10::CachingDeviceAllocator::CreateContextFn;
  using RecordContext = c10::CachingDeviceAllocator::RecordContext;
  using TraceEntry = c10::CachingDeviceAllocator::TraceEntry;
  using AnnotationEntry = c10::CachingDeviceAllocator::AnnotationEntry;
  using Tracker = c10::CachingDeviceAllocator::AllocatorTraceTracker;

  struct Options {
    bool enabled = false;
    CreateContext context_recorder = nullptr;
    size_t entries_max = 0;  // of each device
    RecordContext when = RecordContext::NEVER;
    bool clear = false;
    std::vector<std::string> skip_actions;
  };

  // Leaked on purpose: blocks are freed until the very end of a process.
  static History& instance();

  // Sets how many devices there are; called before any other function.
  void set_device_count(int device_count);

  void configure(const Options& options);
  bool enabled() const noexcept { return enabled_.load(std::memory_order_relaxed); }
  void attach_tracker(Tracker tracker);

  // False while nobody wants to know: on_alloc and on_free may then be left out.
  bool watching() const noexcept {
    return watching_.load(std::memory_order_relaxed) || c10::memoryProfilingEnabled();
  }

  // After the pool has handed a block out, and before it takes the block back, so that another
  // thread's allocation of the same address comes after the free.
  void on_alloc(c10::DeviceIndex device, void* pointer, size_t size_bytes, cudaStream_t stream,
                c10::MempoolId_t pool);
  void on_free(void* pointer);
  void on_out_of_memory(c10::DeviceIndex device, size_t size_bytes, size_t free_bytes,
                        cudaStream_t stream, c10::MempoolId_t pool);
  // After traces(), so that a snapshot is an event of later ones.
  void on_snapshot();
  // After calls that may have given memory back to the driver.
  void on_release(c10::DeviceIndex device);
  // Under the lock of the device's pool.
  void on_segment(const spillover_segment_change& change) noexcept;

  // A text that this thread's events carry from now on; "" for none.
  static void set_metadata(const std::string& metadata);
  static std::string metadata();
  // What torch.compile says that this thread runs, innermost last.
  static void push_compile_context(const std::string& context);
  static void pop_compile_context();
  // What record_function says of the program's regions; kept while history is enabled.
  void annotate_region(c10::DeviceIndex device,
                       const std::vector<std::pair<std::string, std::string>>& fields);
  // Attaches a text to a live block, as an event of its own; torch has them since 2.14.
  void annotate(const void* pointer, const std::string& text);

  // Stack trace of the allocation of a live block, null where none was kept.
  Context context_of(const void* pointer) const;

  // The entries of each device, oldest first, with their times in microseconds since 1970.
  std::vector<std::vector<TraceEntry>> traces();
  // The regions likewise.
  std::vector<AnnotationEntry> annotations();

 private:
  struct Live {
    c10::DeviceIndex device = 0;
    size_t size_bytes = 0;
    cudaStream_t stream = nullptr;
    c10::MempoolId_t pool = kNoPool;
    Context context;
  };

  History() = default;
  Context gather(RecordContext level) const;
  void start_watching();
  void enter_live_blocks();
  void end_walk();
  TraceEntry make_entry(TraceEntry::Action action, c10::DeviceIndex device, size_t address,
                        size_t size_bytes, cudaStream_t stream, c10::MempoolId_t pool,
                        Context context) const;
  void keep(const TraceEntry& entry);
  void tell_trackers(const TraceEntry& entry);
  void record(const TraceEntry& entry);  // both
  void record_segments(c10::DeviceIndex device, RecordContext level);
  void tell_profiler(const Live& block, void* pointer, int64_t change_bytes);

  std::atomic<bool> watching_{false};
  std::atomic<bool> enabled_{false};
  std::atomic<CreateContext> context_recorder_{nullptr};
  std::atomic<RecordContext> when_{RecordContext::NEVER};

  std::mutex walk_mutex_;  // Held while the blocks older than a watch are entered; before mutex_.
  mutable std::mutex mutex_;
  // Guarded by mutex_.
  std::vector<std::deque<TraceEntry>> segment_entries_;  // One queue a device; not yet kept.
  bool is_walking_ = false;
  std::unordered_set<const void*> freed_in_walk_;
  int device_count_ = 0;
  size_t entries_max_ = 0;
  std::vector<TraceEntry::Action> skipped_;
  std::vector<std::deque<TraceEntry>> entries_;  // one queue a device
  std::deque<AnnotationEntry> annotations_;      // at most entries_max_
  std::vector<Tracker> trackers_;
  bool profiled_ = false;  // once a profiler wanted sizes, they are kept for the next one
  std::unordered_map<const void*, Live> live_;
  c10::ApproximateClockToUnixTimeConverter clock_;  // measures from its construction on
};

}  // namespace spillover::torch_adapter
