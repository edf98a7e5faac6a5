#include "torch_adapter/history.hpp"

#include <algorithm>
#include <cstdio>
#include <exception>
#include <map>
#include <utility>

#include "torch_adapter/gil.hpp"
#include "torch_adapter/pool.hpp"
#include "torch_adapter/private_pools.hpp"
#include "torch_adapter/torch_version.hpp"

namespace spillover::torch_adapter {
namespace {

thread_local std::string user_metadata;
thread_local std::vector<std::string> compile_contexts;

}  // namespace

History& History::instance() {
  static History* const history = new History;
  return *history;
}

void History::set_device_count(int device_count) {
  const std::lock_guard lock(mutex_);
  device_count_ = device_count;
  entries_.resize(static_cast<size_t>(device_count));
  segment_entries_.resize(static_cast<size_t>(device_count));
}

void History::configure(const Options& options) {
  TORCH_CHECK(options.when == RecordContext::NEVER || options.context_recorder != nullptr,
              "spillover: recording stack traces needs a function that gathers them");
  std::vector<TraceEntry::Action> skipped;
  skipped.reserve(options.skip_actions.size());
  for (const auto& action : options.skip_actions) {
    skipped.push_back(c10::CachingDeviceAllocator::parseTraceEntryAction(action));
  }
  context_recorder_ = options.enabled ? options.context_recorder : nullptr;
  when_ = options.enabled ? options.when : RecordContext::NEVER;
  // Dropping a stack trace takes Python's GIL, so what is cleared outlives the lock.
  std::vector<std::deque<TraceEntry>> dropped_entries;
  std::unordered_map<const void*, Live> dropped_blocks;
  {
    const std::lock_guard lock(mutex_);
    skipped_ = std::move(skipped);
    entries_max_ = std::max<size_t>(options.entries_max, 1);
    if (!options.enabled || options.clear) {
      annotations_.clear();
      dropped_entries.resize(entries_.size());
      entries_.swap(dropped_entries);
      for (auto& waiting : segment_entries_) waiting.clear();
    }
    if (!options.enabled && trackers_.empty() && !profiled_) {
      watching_ = false;
      live_.swap(dropped_blocks);
    }
  }
  enabled_ = options.enabled;
  if (options.enabled) start_watching();
}

void History::attach_tracker(Tracker tracker) {
  {
    const std::lock_guard lock(mutex_);
    trackers_.push_back(std::move(tracker));
  }
  start_watching();
}

void History::start_watching() {
  if (watching_) return;
  std::unordered_map<const void*, Live> stale;  // what a thread entered after the last watch ended
  // Whoever holds the mutex waits for the pool.
  const GilRelease no_gil;
  const std::lock_guard walk(walk_mutex_);
  if (watching_) return;
  {
    const std::lock_guard lock(mutex_);
    live_.swap(stale);
    is_walking_ = true;
    watching_ = true;
  }
  spillover_observe_segments(
      [](const spillover_segment_change* change) { History::instance().on_segment(*change); });
  try {
    enter_live_blocks();
  } catch (...) {
    end_walk();
    throw;
  }
  end_walk();
}

void History::end_walk() {
  const std::lock_guard lock(mutex_);
  is_walking_ = false;
  freed_in_walk_.clear();
}

void History::enter_live_blocks() {
  struct Walk {
    c10::DeviceIndex device;
    std::vector<std::pair<const void*, Live>> found;
    std::vector<uint32_t> arenas;  // of what was found
  };
  int device_count = 0;
  {
    const std::lock_guard lock(mutex_);
    device_count = device_count_;
  }
  for (int device = 0; device < device_count; ++device) {
    Walk walk{static_cast<c10::DeviceIndex>(device), {}, {}};
    const auto visit = [](void* user, const spillover_segment_info* segment,
                          const spillover_block_info* blocks) {
      auto& found = *static_cast<Walk*>(user);
      for (size_t i = 0; i < segment->block_count; ++i) {
        if (blocks[i].state != 1) continue;
        found.found.emplace_back(blocks[i].address,
                                 Live{.device = found.device,
                                      .size_bytes = blocks[i].requested_bytes,
                                      .stream = static_cast<cudaStream_t>(segment->stream)});
        found.arenas.push_back(segment->tag);
      }
    };
    check_pool(without_gil([&] { return spillover_visit_segments(device, visit, &walk); }),
               "listing the live blocks");
    // The pool is unlocked again, so that private pools may be asked for.
    std::map<uint32_t, c10::MempoolId_t> ids;
    for (size_t i = 0; i < walk.found.size(); ++i) {
      const auto [id, is_new] = ids.try_emplace(walk.arenas[i], kNoPool);
      if (is_new) id->second = PrivatePools::instance().id_of(walk.device, walk.arenas[i]);
      walk.found[i].second.pool = id->second;
    }
    const std::lock_guard lock(mutex_);
    for (auto& [pointer, block] : walk.found) {
      if (!freed_in_walk_.contains(pointer)) live_.try_emplace(pointer, std::move(block));
    }
  }
}

History::Context History::gather(RecordContext level) const {
  const CreateContext recorder = context_recorder_.load();
  return recorder != nullptr && when_.load() >= level ? recorder() : nullptr;
}

History::TraceEntry History::make_entry(TraceEntry::Action action, c10::DeviceIndex device,
                                        size_t address, size_t size_bytes, cudaStream_t stream,
                                        c10::MempoolId_t pool, Context context) const {
  return {action,
          device,
          address,
          size_bytes,
          stream,
          pool,
          c10::getApproximateTime(),
          std::move(context),
          compile_contexts.empty() ? "N/A" : compile_contexts.back(),
          user_metadata};
}

void History::keep(const TraceEntry& entry) {
  const TraceEntry::Action action = entry.action_;
  std::deque<TraceEntry> dropped;  // outlives the lock, like every stack trace
  const std::lock_guard lock(mutex_);
  const bool skip = std::find(skipped_.begin(), skipped_.end(), action) != skipped_.end();
  const auto device = static_cast<size_t>(static_cast<unsigned char>(entry.device_));
  if (!enabled_ || skip || device >= entries_.size()) return;
  auto& queue = entries_[device];
  queue.push_back(entry);
  while (queue.size() > entries_max_) {
    dropped.push_back(std::move(queue.front()));
    queue.pop_front();
  }
}

void History::tell_trackers(const TraceEntry& entry) {
  std::vector<Tracker> trackers;
  {
    const std::lock_guard lock(mutex_);
    trackers = trackers_;
  }
  for (const auto& tracker : trackers) tracker(entry);
}

void History::record(const TraceEntry& entry) {
  keep(entry);
  tell_trackers(entry);
}

void History::on_segment(const spillover_segment_change& change) noexcept {
  if (!watching_.load(std::memory_order_relaxed)) return;
  const auto device = static_cast<c10::DeviceIndex>(change.device);
  auto action = change.is_mapped != 0 ? TraceEntry::SEGMENT_MAP : TraceEntry::SEGMENT_UNMAP;
  if (change.is_fixed != 0) {
    action = change.is_mapped != 0 ? TraceEntry::SEGMENT_ALLOC : TraceEntry::SEGMENT_FREE;
  }
  try {
    const TraceEntry entry =
        make_entry(action, device, reinterpret_cast<size_t>(change.address), change.size_bytes,
                   static_cast<cudaStream_t>(change.stream),
                   PrivatePools::instance().id_of(device, change.tag), nullptr);
    {
      const std::lock_guard lock(mutex_);
      const auto index = static_cast<size_t>(change.device);
      if (enabled_ && index < segment_entries_.size()) {
        segment_entries_[index].push_back(entry);
        if (segment_entries_[index].size() > entries_max_) segment_entries_[index].pop_front();
      }
    }
    tell_trackers(entry);
  } catch (const std::exception& error) {
    // The pool is in the middle of a change that it cannot take back.
    std::fprintf(stderr, "spillover: a trace tracker failed on a segment of %zu bytes at %p: %s\n",
                 change.size_bytes, change.address, error.what());
  } catch (...) {
    std::fprintf(stderr, "spillover: a trace tracker failed on a segment of %zu bytes at %p\n",
                 change.size_bytes, change.address);
  }
}

// Keeps what has happened to segments since the last time, with where this thread is now.
void History::record_segments(c10::DeviceIndex device, RecordContext level) {
  if (!enabled()) return;
  std::deque<TraceEntry> entries;
  {
    const std::lock_guard lock(mutex_);
    const auto index = static_cast<size_t>(static_cast<unsigned char>(device));
    if (index < segment_entries_.size()) entries.swap(segment_entries_[index]);
  }
  if (entries.empty()) return;
  const Context context = gather(level);
  for (TraceEntry& entry : entries) {
    entry.context_ = context;
    keep(entry);
  }
}

void History::on_release(c10::DeviceIndex device) {
  record_segments(device, RecordContext::ALL);
}

void History::set_metadata(const std::string& metadata) {
  user_metadata = metadata;
}

std::string History::metadata() {
  return user_metadata;
}

void History::push_compile_context(const std::string& context) {
  compile_contexts.push_back(context);
}

void History::pop_compile_context() {
  if (!compile_contexts.empty()) compile_contexts.pop_back();
}

#if SPILLOVER_TORCH_AT_LEAST(2, 14)
void History::annotate(const void* pointer, const std::string& text) {
  if (!enabled()) return;
  Live block;
  {
    const std::lock_guard lock(mutex_);
    const auto found = live_.find(pointer);
    if (found == live_.end()) return;
    block = found->second;
  }
  TraceEntry entry =
      make_entry(TraceEntry::ANNOTATE, block.device, reinterpret_cast<size_t>(pointer),
                 block.size_bytes, block.stream, block.pool, gather(RecordContext::ALLOC));
  entry.user_metadata_ = text;
  record(entry);
}
#endif

void History::annotate_region(c10::DeviceIndex device,
                              const std::vector<std::pair<std::string, std::string>>& fields) {
  AnnotationEntry entry(device, c10::getApproximateTime());
  for (const auto& [name, value] : fields) entry.recordUserMetadata(name, value);
  const std::lock_guard lock(mutex_);
  if (!enabled_) return;
  annotations_.push_back(std::move(entry));
  while (annotations_.size() > entries_max_) annotations_.pop_front();
}

void History::tell_profiler(const Live& block, void* pointer, int64_t change_bytes) {
  const spillover_stats_t stats = pool_stats(block.device);
  c10::reportMemoryUsageToProfiler(
      pointer, change_bytes,
      static_cast<size_t>(stats.allocated_bytes[SPILLOVER_CLASS_ALL].current),
      static_cast<size_t>(stats.reserved_bytes[SPILLOVER_CLASS_ALL].current),
      cuda_device(block.device));
}

void History::on_alloc(c10::DeviceIndex device, void* pointer, size_t size_bytes,
                       cudaStream_t stream, c10::MempoolId_t pool) {
  const bool profiling = c10::memoryProfilingEnabled();
  if (profiling) start_watching();
  Live block{device, size_bytes, stream, pool, gather(RecordContext::STATE)};
  Context replaced;
  {
    const std::lock_guard lock(mutex_);
    profiled_ |= profiling;
    Live& entry = live_[pointer];
    replaced = std::move(entry.context);
    entry = block;
  }
  const bool with_context = when_.load() >= RecordContext::ALLOC;
  record_segments(device, RecordContext::ALLOC);
  record(make_entry(TraceEntry::ALLOC, device, reinterpret_cast<size_t>(pointer), size_bytes,
                    stream, pool, with_context ? block.context : nullptr));
  if (profiling) tell_profiler(block, pointer, static_cast<int64_t>(size_bytes));
}

void History::on_free(void* pointer) {
  const bool profiling = c10::memoryProfilingEnabled();
  if (profiling) start_watching();
  Live block;
  {
    const std::lock_guard lock(mutex_);
    profiled_ |= profiling;
    // The walk may have seen it live already.
    if (is_walking_) freed_in_walk_.insert(pointer);
    const auto found = live_.find(pointer);
    if (found == live_.end()) return;
    block = std::move(found->second);
    live_.erase(found);
  }
  // The pool does not say when the last stream is done with a block, so that a free counts as
  // complete when it is asked for.
  const Context context = gather(RecordContext::ALL);
  for (const auto action : {TraceEntry::FREE_REQUESTED, TraceEntry::FREE_COMPLETED}) {
    record(make_entry(action, block.device, reinterpret_cast<size_t>(pointer), block.size_bytes,
                      block.stream, block.pool, context));
  }
  if (profiling) tell_profiler(block, pointer, -static_cast<int64_t>(block.size_bytes));
}

void History::on_out_of_memory(c10::DeviceIndex device, size_t size_bytes, size_t free_bytes,
                               cudaStream_t stream, c10::MempoolId_t pool) {
  if (!watching()) return;
  record_segments(device, RecordContext::ALLOC);
  record(make_entry(TraceEntry::OOM, device, free_bytes, size_bytes, stream, pool,
                    gather(RecordContext::ALLOC)));
}

void History::on_snapshot() {
  if (!watching()) return;
  int device_count = 0;
  {
    const std::lock_guard lock(mutex_);
    device_count = device_count_;
  }
  for (int device = 0; device < device_count; ++device) {
    const auto index = static_cast<c10::DeviceIndex>(device);
    const auto active_bytes = pool_stats(index).active_bytes[SPILLOVER_CLASS_ALL].current;
    record(make_entry(TraceEntry::SNAPSHOT, index, 0, static_cast<size_t>(active_bytes), nullptr,
                      kNoPool, nullptr));
  }
}

History::Context History::context_of(const void* pointer) const {
  const std::lock_guard lock(mutex_);
  const auto found = live_.find(pointer);
  return found == live_.end() ? nullptr : found->second.context;
}

std::vector<std::vector<History::TraceEntry>> History::traces() {
  int device_count = 0;
  {
    const std::lock_guard lock(mutex_);
    device_count = device_count_;
  }
  for (int device = 0; device < device_count; ++device) {
    record_segments(static_cast<c10::DeviceIndex>(device), RecordContext::ALL);
  }
  std::vector<std::vector<TraceEntry>> result;
  {
    const std::lock_guard lock(mutex_);
    for (const auto& queue : entries_) result.emplace_back(queue.begin(), queue.end());
  }
  const auto to_nanoseconds = clock_.makeConverter();
  for (auto& trace : result) {
    for (auto& entry : trace) {
      entry.time_.t_ = to_nanoseconds(entry.time_.approx_t_) / 1000;
    }
  }
  return result;
}

std::vector<History::AnnotationEntry> History::annotations() {
  std::vector<AnnotationEntry> result;
  {
    const std::lock_guard lock(mutex_);
    result.assign(annotations_.begin(), annotations_.end());
  }
  const auto to_nanoseconds = clock_.makeConverter();
  for (auto& entry : result) entry.time_.t_ = to_nanoseconds(entry.time_.approx_t_) / 1000;
  return result;
}

}  // namespace spillover::torch_adapter
