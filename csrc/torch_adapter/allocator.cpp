#include "torch_adapter/allocator.hpp"

#include <c10/core/impl/GPUTrace.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/util/Exception.h>
#include <c10/util/env.h>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <optional>
#include <utility>

#include "torch_adapter/device_stats.hpp"
#include "torch_adapter/gil.hpp"
#include "torch_adapter/history.hpp"
#include "torch_adapter/out_of_memory.hpp"
#include "torch_adapter/pool.hpp"
#include "torch_adapter/pool_source.hpp"
#include "torch_adapter/private_pools.hpp"
#include "torch_adapter/snapshot.hpp"
#include "torch_adapter/uncached.hpp"

namespace spillover::torch_adapter {
namespace {

// Larger requests are mistakes, often a negative size; torch's own limit.
constexpr size_t kSizeMax = size_t{1} << 60U;

// A deleter must not throw, and a block that cannot be freed must not go unnoticed.
void report_free_failure(void* pointer, const char* reason) noexcept {
  std::fprintf(stderr, "spillover: freeing device memory at %p failed: %s\n", pointer, reason);
}

// Without caching a block is memory of its own from the driver (uncached.hpp), but for private
// pools. Of blocks that the pool has handed out before nothing idle is kept: each free gives the
// driver whatever pages have no live block any more, and waits for the device as cudaFree does.
std::atomic<bool> is_caching{true};

void return_idle(int device, void* freed) noexcept {
  if (without_gil([&] { return spillover_trim(device, 0); }) != SPILLOVER_OK) {
    report_free_failure(freed, last_pool_error());
  }
  try {
    History::instance().on_release(static_cast<c10::DeviceIndex>(device));
  } catch (const std::exception& error) {
    report_free_failure(freed, error.what());
  }
}

void delete_block(void* pointer) noexcept {
  if (pointer == nullptr || free_uncached(pointer)) return;
  const bool keeps_idle = is_caching.load(std::memory_order_relaxed);
  // Only live blocks have a device; in a forked child none has.
  const int trimmed_device = C10_LIKELY(keeps_idle) ? -1 : spillover_device_of(pointer);
  if (C10_UNLIKELY(History::instance().watching())) {
    // In a forked child the block is the parent's, and History's lock may be held for ever.
    if (spillover_in_forked_child() != 0) return;
    try {
      History::instance().on_free(pointer);
    } catch (const std::exception& error) {
      report_free_failure(pointer, error.what());
    }
  }
  if (const auto* trace = c10::impl::GPUTrace::get_trace(); C10_UNLIKELY(trace != nullptr)) {
    (*trace)->trace_gpu_memory_deallocation(c10::DeviceType::CUDA,
                                            reinterpret_cast<uintptr_t>(pointer));
  }
  spillover_status status = spillover_try_free(pointer);
  if (C10_UNLIKELY(status == SPILLOVER_BUSY)) {
    const GilRelease no_gil;
    status = spillover_free(pointer);
  }
  if (status != SPILLOVER_OK) report_free_failure(pointer, last_pool_error());
  if (C10_UNLIKELY(trimmed_device >= 0)) return_idle(trimmed_device, pointer);
}

// The handle of a stream, which torch's getter makes several calls for. torch's own streams, which
// the last bit of their number tells from those that others made, never die: the pool is told so
// once, and this thread remembers the handle of the one that it used last.
cudaStream_t handle_of(c10::cuda::CUDAStream stream) {
  if (stream.id() == 0) return nullptr;
  if ((stream.id() & 1) == 0) return stream.stream();
  struct Known {
    c10::StreamId id = 0;
    c10::DeviceIndex device = -1;
    cudaStream_t handle = nullptr;
  };
  thread_local Known known;
  if (C10_UNLIKELY(known.id != stream.id() || known.device != stream.device_index())) {
    const cudaStream_t handle = stream.stream();
    check_pool(spillover_keep_stream(stream.device_index(), handle), "keeping a stream");
    known = {stream.id(), stream.device_index(), handle};
  }
  return known.handle;
}

cudaStream_t current_stream(c10::DeviceIndex device) {
  return handle_of(c10::cuda::getCurrentCUDAStream(device));
}

c10::MempoolId_t pool_of(c10::DeviceIndex device, const std::optional<uint32_t>& arena) {
  return arena ? PrivatePools::instance().id_of(device, *arena) : kNoPool;
}

// Whose memory a block is: a pool's that has lent it, too.
c10::MempoolId_t pool_of_block(c10::DeviceIndex device, const void* pointer) {
  uint32_t arena = 0;
  check_pool(spillover_tag_of(pointer, &arena), "looking up a block's pool");
  return PrivatePools::instance().id_of(device, arena);
}

// What observers of allocations want to know.
void tell_allocated(c10::DeviceIndex device, void* pointer, size_t size_bytes,
                    cudaStream_t stream) {
  if (C10_UNLIKELY(History::instance().watching())) {
    History::instance().on_alloc(device, pointer, size_bytes, stream,
                                 pool_of_block(device, pointer));
  }
  if (const auto* trace = c10::impl::GPUTrace::get_trace(); C10_UNLIKELY(trace != nullptr)) {
    (*trace)->trace_gpu_memory_allocation(c10::DeviceType::CUDA,
                                          reinterpret_cast<uintptr_t>(pointer));
  }
}

// delete_block as a plain function pointer: deleters are compared to tell whose block it is.
void raw_delete_block(void* pointer) {
  delete_block(pointer);
}

}  // namespace

Allocator& Allocator::instance() {
  static Allocator* const allocator = new Allocator;
  return *allocator;
}

void* Allocator::allocate_block(c10::DeviceIndex device, size_t size_bytes, cudaStream_t stream) {
  if (size_bytes == 0) return nullptr;
  TORCH_CHECK_WITH(OutOfMemoryError, size_bytes < kSizeMax,
                   "CUDA out of memory. Tried to allocate more than 1EB memory.");
  void* pointer = nullptr;
  std::optional<uint32_t> arena;
  if (C10_UNLIKELY(PrivatePools::is_routing())) {
    arena = PrivatePools::instance().arena_for(device, stream);
  }
  if (C10_UNLIKELY(!is_caching.load(std::memory_order_relaxed)) && !arena) {
    return allocate_uncached(device, size_bytes, stream);
  }
  spillover_status status =
      arena ? SPILLOVER_BUSY : spillover_try_alloc(device, size_bytes, stream, &pointer);
  if (status == SPILLOVER_BUSY) {
    if (arena) forget_source_failure();
    const GilRelease no_gil;
    const auto allocate = [&] {
      return arena ? spillover_alloc_in(device, size_bytes, stream, *arena, &pointer)
                   : spillover_alloc(device, size_bytes, stream, &pointer);
    };
    status = allocate();
    if (status == SPILLOVER_OUT_OF_MEMORY && run_free_memory_callbacks()) status = allocate();
  }
  if (C10_UNLIKELY(status == SPILLOVER_OUT_OF_MEMORY)) {
    if (arena) rethrow_source_failure();
    throw_out_of_memory(device, size_bytes, stream, pool_of(device, arena));
  }
  check_pool(status, "allocating device memory");
  tell_allocated(device, pointer, size_bytes, stream);
  return pointer;
}

c10::DataPtr Allocator::allocate(size_t size_bytes) {
  const c10::DeviceIndex device = c10::cuda::current_device();
  void* pointer = allocate_block(device, size_bytes, current_stream(device));
  // torch relies on the context being the pointer itself.
  return {pointer, pointer, &raw_delete_block, cuda_device(device)};
}

#if SPILLOVER_TORCH_AT_LEAST(2, 14)
c10::DataPtr Allocator::allocateWithAddress(size_t size_bytes, void* address) {
  const c10::DeviceIndex device = c10::cuda::current_device();
  const cudaStream_t stream = current_stream(device);
  TORCH_CHECK(is_caching,
              "spillover: memory at an exact address needs torch's caching, which is "
              "switched off");
  std::optional<uint32_t> arena;
  if (PrivatePools::is_routing()) arena = PrivatePools::instance().arena_for(device, stream);
  void* pointer = nullptr;
  const auto status = without_gil([&] {
    return spillover_alloc_at(device, size_bytes, stream, arena.value_or(0), address, &pointer);
  });
  TORCH_CHECK(status == SPILLOVER_OK, "Could not allocate CUDA storage at exact address ", address,
              ": ", last_pool_error());
  tell_allocated(device, pointer, size_bytes, stream);
  return {pointer, pointer, &raw_delete_block, cuda_device(device)};
}
#endif

c10::DeleterFnPtr Allocator::raw_deleter() const {
  return &raw_delete_block;
}

void* Allocator::raw_alloc(size_t size_bytes) {
  const c10::DeviceIndex device = c10::cuda::current_device();
  return allocate_block(device, size_bytes, current_stream(device));
}

void* Allocator::raw_alloc_with_stream(size_t size_bytes, cudaStream_t stream) {
  return allocate_block(c10::cuda::current_device(), size_bytes, stream);
}

void Allocator::raw_delete(void* pointer) {
  delete_block(pointer);
}

void Allocator::copy_data(void* destination, const void* source, size_t size_bytes) const {
  C10_CUDA_CHECK(cudaMemcpy(destination, source, size_bytes, cudaMemcpyDeviceToDevice));
}

void Allocator::recordStream(const c10::DataPtr& data, c10::cuda::CUDAStream stream) {
  // Empty tensors, and storages that another allocator or an IPC handle made, are not ours to hold.
  // Freeing one that has memory of its own waits for all streams.
  if (!data.get() || data.get_deleter() != &raw_delete_block || is_uncached(data.get())) return;
  const cudaStream_t handle = handle_of(stream);
  const int device = stream.device_index();
  check_pool(without_gil([&] { return spillover_record_stream_of(data.get(), device, handle); }),
             "record_stream");
}

void* Allocator::getBaseAllocation(void* pointer, size_t* size_bytes) {
  void* base = nullptr;
  size_t segment_bytes = 0;
  check_pool(spillover_base(pointer, &base, &segment_bytes), "looking up a block's segment");
  if (size_bytes != nullptr) *size_bytes = segment_bytes;
  return base;
}

void Allocator::init(int device_count) {
  History::instance().set_device_count(device_count);
  // torch's own switch for debuggers of memory.
  if (c10::utils::has_env("PYTORCH_NO_CUDA_MEMORY_CACHING")) is_caching = false;
  device_count_ = device_count;
}

bool Allocator::initialized() {
  return device_count_ > 0;
}

void Allocator::enable(bool value) {
  is_caching = value;
  if (!value) emptyCache();
}

bool Allocator::isEnabled() const {
  return is_caching;
}

double Allocator::getMemoryFraction(c10::DeviceIndex device) {
  return pool_memory_fraction(device);
}

void Allocator::setMemoryFraction(double fraction, c10::DeviceIndex device) {
  check_pool(without_gil([&] { return spillover_set_memory_fraction(device, fraction); }),
             "setting the memory fraction");
}

void Allocator::emptyCache(c10::MempoolId_t pool) {
  if (pool != kNoPool) {
    if (spillover_in_forked_child() != 0) return;  // It is a MemPool's end, and the parent's pool.
    PrivatePools::instance().trim(pool);
  } else {
    const GilRelease no_gil;
    for (int device = 0; device < device_count_; ++device) {
      check_pool(spillover_trim(device, 0), "emptying the cache");
    }
    PrivatePools::instance().forget_unused();
  }
  for (int device = 0; device < device_count_; ++device) {
    History::instance().on_release(static_cast<c10::DeviceIndex>(device));
  }
}

void Allocator::cacheInfo(c10::DeviceIndex device, size_t* largest_block) {
  if (*largest_block == 0) {
    // A zero asks for a first guess: what the driver could still give.
    const c10::cuda::CUDAGuard guard(device);
    size_t total_bytes = 0;
    C10_CUDA_CHECK(cudaMemGetInfo(largest_block, &total_bytes));
  }
  *largest_block = std::max(*largest_block, pool_largest_free_bytes(device));
}

std::vector<cuda_allocator::StreamSegmentSize> Allocator::getExpandableSegmentSizes(
    c10::DeviceIndex /*device*/) {
  return {};  // Growth needs no attention of torch's: it is not limited to one reservation.
}

std::string Allocator::name() {
  return "spillover";
}

c10::CachingDeviceAllocator::DeviceStats Allocator::getDeviceStats(c10::DeviceIndex device) {
  return to_device_stats(pool_stats(device));
}

void Allocator::resetAccumulatedStats(c10::DeviceIndex device) {
  check_pool(without_gil([&] { return spillover_reset_accumulated_stats(device); }),
             "resetting the statistics");
}

void Allocator::resetPeakStats(c10::DeviceIndex device) {
  check_pool(without_gil([&] { return spillover_reset_peak_stats(device); }),
             "resetting the peaks");
}

cuda_allocator::SnapshotInfo Allocator::snapshot(c10::MempoolId_t pool, bool include_traces) {
  cuda_allocator::SnapshotInfo result = take_snapshot(device_count_, pool);
  if (include_traces) {
    result.device_traces = History::instance().traces();
    result.external_annotations = History::instance().annotations();
  } else {
    result.device_traces.resize(static_cast<size_t>(device_count_.load()));
  }
  History::instance().on_snapshot();
  return result;
}

bool Allocator::isHistoryEnabled() {
  return History::instance().enabled();
}

void Allocator::recordHistory(bool enabled, cuda_allocator::CreateContextFn context_recorder,
                              size_t entries_max, cuda_allocator::RecordContext when,
                              bool clear_history, const std::vector<std::string>& skip_actions) {
  History::Options options;
  options.enabled = enabled;
  options.context_recorder = context_recorder;
  options.entries_max = entries_max;
  options.when = when;
  options.clear = clear_history;
  options.skip_actions = skip_actions;
  History::instance().configure(options);
}

void Allocator::recordAnnotation(const std::vector<std::pair<std::string, std::string>>& fields) {
  if (!History::instance().enabled()) return;
  History::instance().annotate_region(c10::cuda::current_device(), fields);
}

void Allocator::attachOutOfMemoryObserver(cuda_allocator::OutOfMemoryObserver observer) {
  attach_out_of_memory_observer(std::move(observer));
}

void Allocator::attachAllocatorTraceTracker(cuda_allocator::AllocatorTraceTracker tracker) {
  History::instance().attach_tracker(std::move(tracker));
}

#if SPILLOVER_TORCH_AT_LEAST(2, 12)
void Allocator::attachOomRejectionObserver(cuda_allocator::OomRejectionObserver observer) {
  attach_rejection_observer(std::move(observer));
}

std::shared_ptr<c10::GatheredContext> Allocator::getContextForPointer(const void* pointer) {
  return History::instance().context_of(pointer);
}
#endif

void Allocator::pushCompileContext(std::string& context) {
  History::push_compile_context(context);
}

void Allocator::popCompileContext() {
  History::pop_compile_context();
}

void Allocator::setUserMetadata(const std::string& metadata) {
  History::set_metadata(metadata);
}

std::string Allocator::getUserMetadata() {
  return History::metadata();
}

#if SPILLOVER_TORCH_AT_LEAST(2, 14)
bool Allocator::supportsUserMetadata() {
  return true;
}

void Allocator::annotateMemory(const void* pointer, const std::string& metadata) {
  History::instance().annotate(pointer, metadata);
}
#endif

void Allocator::beginAllocateToPool(c10::DeviceIndex device, c10::MempoolId_t pool,
                                    std::function<bool(cudaStream_t)> filter) {
  PrivatePools::instance().begin(device, pool, std::move(filter), current_stream(device));
}

void Allocator::endAllocateToPool(c10::DeviceIndex device, c10::MempoolId_t pool) {
  PrivatePools::instance().end(device, pool);
}

void Allocator::releasePool(c10::DeviceIndex device, c10::MempoolId_t pool) {
  PrivatePools::instance().remove_use(device, pool);
}

int Allocator::getPoolUseCount(c10::DeviceIndex device, c10::MempoolId_t pool) {
  return PrivatePools::instance().use_count(device, pool);
}

void Allocator::createOrIncrefPool(c10::DeviceIndex device, c10::MempoolId_t pool,
                                   std::shared_ptr<CUDAAllocator> allocator) {
  // This allocator as a pool's own is what a pool without one has.
  if (allocator.get() == this) allocator = nullptr;
  PrivatePools::instance().add_use(device, pool, std::move(allocator));
}

void Allocator::setUseOnOOM(c10::DeviceIndex device, c10::MempoolId_t pool, bool use_on_oom) {
  PrivatePools::instance().set_use_on_oom(device, pool, use_on_oom);
}

void Allocator::setNoSplit(c10::DeviceIndex device, c10::MempoolId_t pool) {
  PrivatePools::instance().set_no_split(device, pool);
}

bool Allocator::checkPoolLiveAllocations(c10::DeviceIndex device, c10::MempoolId_t pool,
                                         const std::unordered_set<void*>& expected) {
  const auto arena = PrivatePools::instance().arena_of(device, pool);
  TORCH_CHECK(arena, "Could not find pool of id (", pool.first, ", ", pool.second, ")");
  const std::vector<LiveBlock> live = live_blocks(device, *arena);
  return live.size() == expected.size() &&
         std::all_of(live.begin(), live.end(), [&](const LiveBlock& block) {
           return expected.count(block.info.address) != 0;
         });
}

void Allocator::enablePeerAccess(c10::DeviceIndex device, c10::DeviceIndex device_to_access) {
  const c10::cuda::CUDAGuard guard(device);
  const cudaError_t error = cudaDeviceEnablePeerAccess(device_to_access, 0);
  if (error == cudaErrorPeerAccessAlreadyEnabled) {
    // What is wanted is so already; the sticky error must not reach the next CUDA call.
    (void)cudaGetLastError();
  } else {
    C10_CUDA_CHECK(error);
  }
  // Mapped memory has access rights of its own.
  check_pool(without_gil([&] { return spillover_add_peer(device_to_access, device); }),
             "giving a device access to its peer");
}

cudaError_t Allocator::memcpyAsync(void* destination, int destination_device, const void* source,
                                   int source_device, size_t size_bytes, cudaStream_t stream,
                                   bool p2p_enabled) {
  if (p2p_enabled || destination_device == source_device) {
    return cudaMemcpyAsync(destination, source, size_bytes, cudaMemcpyDeviceToDevice, stream);
  }
  return cudaMemcpyPeerAsync(destination, destination_device, source, source_device, size_bytes,
                             stream);
}

}  // namespace spillover::torch_adapter
