#include "allocator/pool.hpp"

#include <algorithm>
#include <iterator>
#include <utility>

#include "allocator/page_table.hpp"
#include "allocator/size_rounding.hpp"
#include "allocator/statistics.hpp"
#include "base/bytes.hpp"
#include "base/check.hpp"
#include "base/error.hpp"
#include "driver/context.hpp"
#include "driver/device.hpp"

namespace spillover {
namespace {

// Beyond any device; keeps sums of rounded sizes from overflowing.
constexpr size_t kRequestMax = size_t{1} << 56;

// Freed bytes of foreign streams at which the pool waits for the device before it takes more memory
// from the driver: a program that makes stream after stream would fill the device otherwise.
constexpr size_t kForeignBytesMax = 256 * kMiB;

}  // namespace

Pool::Pool(int device, const Settings& settings)
    : device_(device),
      device_bytes_(memory_info(device).total_bytes),
      settings_(settings),
      backing_(device, settings.virtual_memory),
      pending_(spare_events_, [this](Block* block) { make_free(block); }) {}

StreamState& Pool::state_of(const StreamKey& key, ArenaId arena) {
  const auto known = streams_.find({key, arena});
  if (known != streams_.end()) return known->second;
  if (const int device = device_of_stream(device_, key.handle); device != device_) {
    throw ConfigError("memory of device " + std::to_string(device_) +
                      " was asked for on a stream of device " + std::to_string(device) +
                      "; allocate on a stream of the device's own and note the other one with "
                      "record_stream");
  }
  StreamState& state =
      streams_.try_emplace({key, arena}, key, arena, is_immortal(device_, key), forgotten_count_)
          .first->second;
  const auto options = private_arenas_.find(arena);
  state.is_released = is_private_arena(arena) && options == private_arenas_.end();
  state.is_whole = options != private_arenas_.end() && options->second.is_whole;
  state.is_asleep = is_asleep(arena);
  state.has_upstream = upstreams_.count(arena) != 0;
  return state;
}

// Throws StateError for an arena that sleeps, as one may since the request began to wait.
Heap& Pool::heap_of(const Request& request) {
  check_awake(request.arena);
  return state_of(request.stream, request.arena).heap(request.size_class);
}

void* Pool::allocate(size_t size_bytes, StreamHandle stream) {
  if (size_bytes == 0) return nullptr;
  // Also before a look into the magazine: what its blocks were freed behind is no part of the
  // graph.
  check_not_capturing(device_, stream);
  if (void* pointer = allocate_cached(size_bytes, stream)) return pointer;
  const Request request = make_request(size_bytes, stream, ThreadCache::current_arena());
  Lock lock(mutex_);
  check_awake(request.arena);
  return serve(lock, request);
}

Pool::Request Pool::make_request(size_t size_bytes, StreamHandle stream, ArenaId arena) const {
  Request request{size_bytes, kRequestMax, identify_stream(device_, stream), arena,
                  SizeClass::kLarge};
  if (size_bytes < kRequestMax) request.size_bytes = SizeRounding::round(size_bytes);
  if (request.size_bytes <= kSmallRequestMax) request.size_class = SizeClass::kSmall;
  return request;
}

void* Pool::serve(Lock& lock, const Request& request) {
  StreamState& state = state_of(request.stream, request.arena);
  equip(state);
  if (request.size_class == SizeClass::kLarge) empty_large(state);
  note_alive(state);
  if (!pending_.empty()) {
    const RelaxedCaptureScope relaxed;
    pending_.mark({device_, request.stream});
    pending_.poll();
    if (request.capture != 0) {
      const ContextScope scope(device_);
      pending_.complete_captured(request.stream);
    }
  }
  Block* block = obtain(lock, request);
  split(block, request);
  take_over_counters();
  activate(block, request);
  raise_peaks();
  if (settings_.check_every != 0) check_at_intervals();
  return reinterpret_cast<void*>(block->address);
}

// Gives a free block of at least the request's size that is in no heap's set. Throws
// DeviceOutOfMemoryError.
Block* Pool::obtain(Lock& lock, const Request& request) {
  if (Block* block = take_best_fit(request)) return block;
  if (heap_of(request).stream->has_upstream) return obtain_from_upstream(lock, request);
  LadderAttempts attempts;
  attempts.kept_bytes = empty_magazines();
  if (attempts.kept_bytes != 0) {
    if (Block* block = take_best_fit(request)) return block;
  }
  const RelaxedCaptureScope relaxed;
  if (Block* block = grow(request, Source::kHeld)) return block;
  if (foreign_bytes() > kForeignBytesMax && !request.is_captured && !captures()) {
    wait_for_device(lock);
    if (Block* block = grow(request, Source::kHeld)) return block;
  }
  if (Block* block = grow(request, Source::kNew)) return block;
  return obtain_by_waiting(lock, request, attempts);
}

Block* Pool::take_best_fit(const Request& request) {
  Heap& heap = heap_of(request);
  Block wanted;
  wanted.size_bytes = request.size_bytes;
  const auto position = heap.free.lower_bound(&wanted);
  if (position == heap.free.end()) return nullptr;
  Block* block = *position;
  remove_free(block);
  return block;
}

Block* Pool::make_block(Heap& heap, const AddressRange& range, uint64_t freed_at) {
  Block* block = blocks_.take();
  block->heap = &heap;
  block->address = range.begin;
  block->size_bytes = range.size_bytes();
  block->requested_bytes = 0;
  block->state = BlockState::kFree;
  block->previous = block->next = nullptr;
  block->is_shared = false;
  block->freed_at = freed_at;
  ++heap.block_count;
  return block;
}

void Pool::erase_block(Block* block) {
  --block->heap->block_count;
  blocks_.give(block);
}

// Puts a free block, linked to its neighbours, into its heap's set, and takes it out.
void Pool::insert_free(Block* block) {
  Heap& heap = *block->heap;
  heap.free.insert(block);
  heap.free_bytes += block->size_bytes;
  if (!block->is_split()) return;
  add(statistics_.inactive_split, heap.size_class, 1);
  add(statistics_.inactive_split_bytes, heap.size_class, block->size_bytes);
}

void Pool::remove_free(Block* block) {
  Heap& heap = *block->heap;
  heap.free.erase(block);
  heap.free_bytes -= block->size_bytes;
  if (!block->is_split()) return;
  subtract(statistics_.inactive_split, heap.size_class, 1);
  subtract(statistics_.inactive_split_bytes, heap.size_class, block->size_bytes);
}

// Cuts what the request does not need off a free block, to the last unit, unless the block stays
// whole.
void Pool::split(Block* block, const Request& request) {
  if (block->size_bytes == request.size_bytes || block->heap->stream->is_whole) return;
  const AddressRange range{block->address + request.size_bytes, block->end()};
  Block* rest = make_block(*block->heap, range, block->freed_at);
  rest->previous = block;
  rest->next = block->next;
  if (rest->next != nullptr) rest->next->previous = rest;
  block->next = rest;
  block->size_bytes = request.size_bytes;
  insert_free(rest);
}

void Pool::activate(Block* block, const Request& request) {
  SPILLOVER_CHECK(block->state == BlockState::kFree && block->size_bytes >= request.size_bytes,
                  "a block that is not free, or too small, was about to be handed out");
  block->state = BlockState::kLive;
  block->requested_bytes = request.requested_bytes;
  block->capture = request.capture;
  PageTable::instance().set(block);
  const SizeClass size_class = request.size_class;
  add(statistics_.allocation, size_class, 1);
  add(statistics_.allocated_bytes, size_class, block->size_bytes);
  add(statistics_.active, size_class, 1);
  add(statistics_.active_bytes, size_class, block->size_bytes);
  add(statistics_.requested_bytes, size_class, request.requested_bytes);
}

// Needs no lock: a block that is live stays so until its owner frees it.
Block* Pool::live_block(const void* pointer) const {
  const auto address = reinterpret_cast<DeviceAddress>(pointer);
  Block* block = PageTable::instance().find(address);
  const Pool* owner = PageTable::instance().pool_of(address);
  if (owner != nullptr && owner != this) {
    throw ConfigError(format_address(pointer) + " is memory of device " +
                      std::to_string(owner->device_) + ", not of device " +
                      std::to_string(device_));
  }
  if (block == nullptr || block->address != address || block->state != BlockState::kLive) {
    throw ConfigError(format_address(pointer) + " is not the start of a live block of device " +
                      std::to_string(device_) +
                      "'s pool: it was freed before, or comes from somewhere else");
  }
  return block;
}

void Pool::free(void* pointer) {
  if (pointer == nullptr || free_cached(live_block(pointer))) return;
  const std::lock_guard lock(mutex_);
  free_slowly(pointer);
}

bool Pool::try_free(void* pointer) {
  if (pointer == nullptr || free_cached(live_block(pointer))) return true;
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock.owns_lock()) return false;
  free_slowly(pointer);
  return true;
}

void Pool::free_slowly(void* pointer) {
  Block* block = live_block(pointer);
  MagazineSlot* slot = equip(*block->heap->stream);
  if (slot != nullptr && block->uses.empty()) empty(*ThreadCache::current(), *slot);
  take_over_counters();
  count_freed(*block);
  StreamState& stream = *block->heap->stream;
  if (stream.is_asleep) give_up_contents(*block);
  if (may_ask(stream) && !stream.is_asleep) {
    mark_if_due(stream, watermark_bytes(), StreamState::MarkKind::kWatermark);
  }
  if (block->uses.empty()) {
    make_free(block);
  } else {
    block->state = BlockState::kWaiting;
    const RelaxedCaptureScope relaxed;
    pending_.add(block);
  }
  if (settings_.check_every != 0) check_at_intervals();
}

void Pool::count_freed(Block& block) {
  block.freed_at = ++block.heap->stream->freed_count;
  block.is_shared = false;
  note_freed(*block.heap, {block.address, block.end()});
  const SizeClass size_class = block.heap->size_class;
  subtract(statistics_.allocation, size_class, 1);
  subtract(statistics_.allocated_bytes, size_class, block.size_bytes);
}

void Pool::record_stream(void* pointer, StreamHandle stream) {
  if (pointer != nullptr) record_stream(pointer, device_of_stream(device_, stream), stream);
}

void Pool::record_stream(void* pointer, int stream_device, StreamHandle stream) {
  if (pointer == nullptr) return;
  const DeviceStream use{stream_device, identify_stream(stream_device, stream)};
  const std::lock_guard lock(mutex_);
  Block* block = live_block(pointer);
  if (!pending_.empty()) pending_.mark(use);
  if (stream_device == device_) {
    for (auto state = streams_.lower_bound({use.key, kDefaultArena});
         state != streams_.end() && state->second.key == use.key; ++state) {
      note_alive(state->second);
    }
  }
  if (use == DeviceStream{device_, block->heap->stream->key}) return;
  for (const DeviceStream& known : block->uses) {
    if (known == use) return;
  }
  block->uses.push_back(use);
}

bool Pool::is_live(const void* pointer) const {
  const auto address = reinterpret_cast<DeviceAddress>(pointer);
  const Block* block = PageTable::instance().find(address);
  return block != nullptr && block->address == address && block->state == BlockState::kLive;
}

ArenaId Pool::arena_of_block(const void* pointer) const {
  return live_block(pointer)->heap->stream->arena;
}

// Gives a block that no stream uses any more back to its heap.
void Pool::make_free(Block* block) noexcept {
  const SizeClass size_class = block->heap->size_class;
  subtract(statistics_.active, size_class, 1);
  subtract(statistics_.active_bytes, size_class, block->size_bytes);
  subtract(statistics_.requested_bytes, size_class, block->requested_bytes);
  merge_free(block);
}

// Merges the block with its free neighbours and puts the result into its heap's set.
void Pool::merge_free(Block* block) noexcept {
  PageTable::instance().clear(*block);
  block->state = BlockState::kFree;
  block->requested_bytes = 0;
  if (Block* next = block->next; next != nullptr && next->state == BlockState::kFree) {
    remove_free(next);
    absorb_next(block);
  }
  if (Block* previous = block->previous;
      previous != nullptr && previous->state == BlockState::kFree) {
    remove_free(previous);
    absorb_next(previous);
    block = previous;
  }
  insert_free(block);
}

// Extends the block over the one behind it, which is in no set.
void Pool::absorb_next(Block* block) {
  Block* next = block->next;
  SPILLOVER_CHECK(block->end() == next->address && block->heap == next->heap,
                  "two blocks that were about to be merged are not neighbours");
  block->size_bytes += next->size_bytes;
  block->freed_at = std::max(block->freed_at, next->freed_at);
  block->next = next->next;
  if (block->next != nullptr) block->next->previous = block;
  erase_block(next);
}

AddressRange Pool::segment_of(const void* pointer) const {
  const auto address = reinterpret_cast<DeviceAddress>(pointer);
  const std::lock_guard lock(mutex_);
  const auto after = segments_.upper_bound(address);
  if (after != segments_.begin()) {
    const auto& [begin, first] = *std::prev(after);
    const Block* last = first;
    while (last->next != nullptr) last = last->next;
    if (address < last->end()) return {begin, last->end()};
  }
  throw ConfigError(format_address(pointer) + " is not in the memory of device " +
                    std::to_string(device_) +
                    "'s pool: it was freed before, or comes from somewhere else");
}

void Pool::trim(size_t keep_bytes) {
  Lock lock(mutex_);
  const RelaxedCaptureScope relaxed;
  if (!captures()) wait_for_device(lock);
  release_idle(lock, keep_bytes);
  spare_events_.release();
}

void Pool::add_peer(int device) {
  const std::lock_guard lock(mutex_);
  backing_.add_peer(device);
}

size_t Pool::limit_by_settings() const {
  if (settings_.fraction >= 1.0) return settings_.limit_bytes;
  const double share = settings_.fraction * static_cast<double>(device_bytes_);
  return std::min(settings_.limit_bytes, static_cast<size_t>(share));
}

size_t Pool::limit_bytes() const {
  const std::lock_guard lock(mutex_);
  return limit_by_settings();
}

Settings Pool::settings() const {
  const std::lock_guard lock(mutex_);
  return settings_;
}

void Pool::require_changeable(const Settings& settings) const {
  const std::lock_guard lock(mutex_);
  const auto require_same = [&](bool is_same, const char* key) {
    if (is_same) return;
    throw StateError(
        std::string(key) + " cannot change once device " + std::to_string(device_) +
        "'s pool is in use; set it in SPILLOVER_ALLOCATOR, in install() or configure(), "
        "or where the first Pool of the device is made");
  };
  require_same(settings.virtual_memory == settings_.virtual_memory, "virtual_memory");
  require_same(settings.has_thread_cache == settings_.has_thread_cache, "thread_cache");
}

void Pool::configure(const Settings& settings) {
  require_changeable(settings);
  Lock lock(mutex_);
  const Settings former = std::exchange(settings_, settings);
  const size_t limit = limit_by_settings();
  if (backing_.held_bytes() <= limit) return;
  try {
    const RelaxedCaptureScope relaxed;
    empty_magazines();
    release_idle(lock, limit);
  } catch (...) {
    settings_ = former;
    throw;
  }
}

void Pool::restore_settings(const Settings& settings) noexcept {
  const std::lock_guard lock(mutex_);
  settings_ = settings;
}

}  // namespace spillover
