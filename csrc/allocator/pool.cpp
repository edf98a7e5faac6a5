#include "allocator/pool.hpp"

#include <array>
#include <cstdio>
#include <exception>
#include <limits>
#include <utility>

#include "allocator/statistics.hpp"
#include "base/check.hpp"
#include "base/error.hpp"
#include "driver/context.hpp"
#include "driver/device.hpp"

namespace spillover {
namespace {

// Beyond any device; keeps sums of rounded sizes from overflowing.
constexpr size_t kRequestMax = size_t{1} << 56;

// Segment to ask for when the cache has no fit.
size_t preferred_segment_bytes(size_t block_bytes) {
  if (block_bytes <= kSmallRequestMax) return kSmallSegment;
  if (block_bytes < kMediumRequestMax) return kMediumSegment;
  return round_up(block_bytes, kLargeSegmentUnit);
}

// What may be cut off a block: small blocks to the last unit; a large block keeps a remainder that
// no large request could use.
bool is_worth_splitting(size_t remainder_bytes, SizeClass size_class) {
  return size_class == SizeClass::kSmall ? remainder_bytes >= kBlockAlignment
                                         : remainder_bytes > kSmallRequestMax;
}

std::string address_text(const void* pointer) {
  std::array<char, 24> text{};
  std::snprintf(text.data(), text.size(), "%p", pointer);
  return text.data();
}

}  // namespace

Pool::Pool(int device, SegmentIndex& index)
    : device_(device),
      device_bytes_(memory_info(device).total_bytes),
      index_(index),
      pending_(device, [this](Block* block) { make_free(block); }) {}

void* Pool::allocate(size_t size_bytes, StreamHandle stream) {
  if (size_bytes == 0) return nullptr;
  check_not_capturing(device_, stream);
  Request request{size_bytes, kRequestMax, identify_stream(device_, stream), SizeClass::kLarge};
  if (size_bytes < kRequestMax) request.size_bytes = round_up(size_bytes, kBlockAlignment);
  if (request.size_bytes <= kSmallRequestMax) request.size_class = SizeClass::kSmall;

  const std::lock_guard lock(mutex_);
  if (!pending_.empty()) {
    const RelaxedCaptureScope relaxed;
    pending_.poll();
  }
  Block* block = obtain(request);
  split(block, request);
  activate(block, request);
  return reinterpret_cast<void*>(block->address);
}

// Gives a free block of at least the request's size that is in no bin.
Block* Pool::obtain(const Request& request) {
  if (Block* block = take_best_fit(request)) return block;
  const RelaxedCaptureScope relaxed;
  const size_t preferred_bytes = preferred_segment_bytes(request.size_bytes);
  if (Block* block = grow(request, preferred_bytes)) return block;

  pending_.wait();
  if (Block* block = take_best_fit(request)) return block;
  release_free_segments();
  ++statistics_.alloc_retries;
  if (Block* block = grow(request, preferred_bytes)) return block;
  const size_t least_bytes = round_up(request.size_bytes, kLargeSegmentUnit);
  if (least_bytes < preferred_bytes) {
    if (Block* block = grow(request, least_bytes)) return block;
  }
  throw_out_of_memory(request);
}

Block* Pool::take_best_fit(const Request& request) {
  const auto bin = bins_.find({request.stream, request.size_class});
  if (bin == bins_.end()) return nullptr;
  Block wanted;
  wanted.size_bytes = request.size_bytes;
  const auto position = bin->second.lower_bound(&wanted);
  if (position == bin->second.end()) return nullptr;
  Block* block = *position;
  bin->second.erase(position);
  if (bin->second.empty()) bins_.erase(bin);
  return block;
}

// Null when the device or the limit has no room for the segment.
Block* Pool::grow(const Request& request, size_t segment_bytes) {
  const auto reserved_bytes =
      static_cast<size_t>(statistics_.reserved_bytes[SPILLOVER_CLASS_ALL].current);
  const size_t limit = limit_bytes();
  if (segment_bytes > limit || reserved_bytes > limit - segment_bytes) return nullptr;
  auto memory = DeviceMemory::try_allocate(device_, segment_bytes);
  if (!memory) return nullptr;

  const DeviceAddress address = memory->address();
  auto segment = std::make_unique<Segment>(
      Segment{std::move(*memory), request.stream, request.size_class, nullptr});
  auto block = std::make_unique<Block>();
  block->segment = segment.get();
  block->address = address;
  block->size_bytes = segment_bytes;
  Block* result = segment->first = block.get();
  index_.insert({address, segment_bytes, this});
  blocks_.emplace(address, std::move(block));
  segments_.emplace(address, std::move(segment));
  add(statistics_.segment, request.size_class, 1);
  add(statistics_.reserved_bytes, request.size_class, segment_bytes);
  return result;
}

// Cuts what the request does not need off a free block and puts it into its bin. Counts as torch
// does: a split block that shrinks stays one inactive block.
void Pool::split(Block* block, const Request& request) {
  const bool was_split = block->is_split();
  const size_t remainder_bytes = block->size_bytes - request.size_bytes;
  const SizeClass size_class = request.size_class;
  if (!is_worth_splitting(remainder_bytes, size_class)) {
    if (was_split) {
      subtract(statistics_.inactive_split, size_class, 1);
      subtract(statistics_.inactive_split_bytes, size_class, block->size_bytes);
    }
    return;
  }
  auto rest = std::make_unique<Block>();
  rest->segment = block->segment;
  rest->address = block->address + request.size_bytes;
  rest->size_bytes = remainder_bytes;
  rest->previous = block;
  rest->next = block->next;
  if (rest->next != nullptr) rest->next->previous = rest.get();
  block->next = rest.get();
  block->size_bytes = request.size_bytes;
  bins_[{request.stream, size_class}].insert(rest.get());
  blocks_.emplace(rest->address, std::move(rest));
  if (was_split) {
    subtract(statistics_.inactive_split_bytes, size_class, request.size_bytes);
  } else {
    add(statistics_.inactive_split, size_class, 1);
    add(statistics_.inactive_split_bytes, size_class, remainder_bytes);
  }
}

void Pool::activate(Block* block, const Request& request) {
  SPILLOVER_CHECK(block->state == BlockState::kFree && block->size_bytes >= request.size_bytes,
                  "a block that is not free, or too small, was about to be handed out");
  block->state = BlockState::kLive;
  block->requested_bytes = request.requested_bytes;
  const SizeClass size_class = request.size_class;
  add(statistics_.allocation, size_class, 1);
  add(statistics_.allocated_bytes, size_class, block->size_bytes);
  add(statistics_.active, size_class, 1);
  add(statistics_.active_bytes, size_class, block->size_bytes);
  add(statistics_.requested_bytes, size_class, request.requested_bytes);
}

Block* Pool::find_live(const void* pointer) const {
  const auto position = blocks_.find(reinterpret_cast<DeviceAddress>(pointer));
  if (position == blocks_.end() || position->second->state != BlockState::kLive) {
    throw ConfigError(address_text(pointer) + " is not the start of a live block of device " +
                      std::to_string(device_) +
                      "'s pool: it was freed before, or comes from somewhere else");
  }
  return position->second.get();
}

void Pool::free(void* pointer) {
  if (pointer == nullptr) return;
  const std::lock_guard lock(mutex_);
  Block* block = find_live(pointer);
  count_freed(*block);
  if (block->uses.empty()) {
    make_free(block);
    return;
  }
  block->state = BlockState::kWaiting;
  const RelaxedCaptureScope relaxed;
  pending_.add(block);
}

bool Pool::try_free(void* pointer) {
  if (pointer == nullptr) return true;
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock.owns_lock()) return false;
  Block* block = find_live(pointer);
  if (!block->uses.empty()) return false;
  count_freed(*block);
  make_free(block);
  return true;
}

void Pool::count_freed(const Block& block) {
  const SizeClass size_class = block.segment->size_class;
  subtract(statistics_.allocation, size_class, 1);
  subtract(statistics_.allocated_bytes, size_class, block.size_bytes);
}

void Pool::record_stream(void* pointer, StreamHandle stream) {
  if (pointer == nullptr) return;
  const StreamKey key = identify_stream(device_, stream);
  const std::lock_guard lock(mutex_);
  Block* block = find_live(pointer);
  if (key == block->segment->stream) return;
  for (const StreamKey& known : block->uses) {
    if (known == key) return;
  }
  block->uses.push_back(key);
}

bool Pool::is_live(const void* pointer) const {
  const std::lock_guard lock(mutex_);
  const auto position = blocks_.find(reinterpret_cast<DeviceAddress>(pointer));
  return position != blocks_.end() && position->second->state == BlockState::kLive;
}

// Merges the block with its free neighbours and puts the result into its bin.
void Pool::make_free(Block* block) noexcept {
  const SizeClass size_class = block->segment->size_class;
  subtract(statistics_.active, size_class, 1);
  subtract(statistics_.active_bytes, size_class, block->size_bytes);
  subtract(statistics_.requested_bytes, size_class, block->requested_bytes);
  block->state = BlockState::kFree;
  block->requested_bytes = 0;

  auto& bin = bins_[{block->segment->stream, size_class}];
  size_t merged_count = 0;
  size_t merged_bytes = 0;
  if (Block* next = block->next; next != nullptr && next->state == BlockState::kFree) {
    ++merged_count;
    merged_bytes += next->size_bytes;
    bin.erase(next);
    absorb_next(block);
  }
  if (Block* previous = block->previous;
      previous != nullptr && previous->state == BlockState::kFree) {
    ++merged_count;
    merged_bytes += previous->size_bytes;
    bin.erase(previous);
    absorb_next(previous);
    block = previous;
  }
  bin.insert(block);
  // The net change, as torch counts: growing an inactive block is not freeing and adding one.
  const size_t gained_count = block->is_split() ? 1 : 0;
  const size_t gained_bytes = block->is_split() ? block->size_bytes : 0;
  if (gained_count > merged_count) add(statistics_.inactive_split, size_class, 1);
  if (gained_count < merged_count) {
    subtract(statistics_.inactive_split, size_class, merged_count - gained_count);
  }
  if (gained_bytes > merged_bytes) {
    add(statistics_.inactive_split_bytes, size_class, gained_bytes - merged_bytes);
  } else if (gained_bytes < merged_bytes) {
    subtract(statistics_.inactive_split_bytes, size_class, merged_bytes - gained_bytes);
  }
}

// Extends the block over the one behind it, which is in no bin.
void Pool::absorb_next(Block* block) {
  Block* next = block->next;
  SPILLOVER_CHECK(block->address + block->size_bytes == next->address,
                  "two blocks that were about to be merged are not neighbours");
  block->size_bytes += next->size_bytes;
  block->next = next->next;
  if (block->next != nullptr) block->next->previous = block;
  blocks_.erase(next->address);
}

// A segment that the driver fails to free goes all the same: whether it did its work before the
// error is not known, and memory that may be free must never be handed out. Throws the first such
// error when every segment has had its turn.
void Pool::release_free_segments() {
  std::exception_ptr failure;
  for (auto position = segments_.begin(); position != segments_.end();) {
    Segment& segment = *position->second;
    Block* block = segment.first;
    if (block->state != BlockState::kFree || block->is_split()) {
      ++position;
      continue;
    }
    const DeviceAddress address = segment.address();
    const size_t size_bytes = segment.size_bytes();
    try {
      segment.memory.release();
    } catch (const Error&) {
      if (segment.memory.address() != 0) throw;  // The driver was not even asked.
      if (!failure) failure = std::current_exception();
    }
    const auto bin = bins_.find({segment.stream, segment.size_class});
    bin->second.erase(block);
    if (bin->second.empty()) bins_.erase(bin);
    subtract(statistics_.segment, segment.size_class, 1);
    subtract(statistics_.reserved_bytes, segment.size_class, size_bytes);
    index_.erase(address);
    blocks_.erase(address);
    position = segments_.erase(position);
  }
  if (failure) std::rethrow_exception(failure);
}

void Pool::trim() {
  const std::lock_guard lock(mutex_);
  const RelaxedCaptureScope relaxed;
  pending_.wait();
  release_free_segments();
}

size_t Pool::limit_bytes() const {
  if (memory_fraction_ >= 1.0) return std::numeric_limits<size_t>::max();
  return static_cast<size_t>(memory_fraction_ * static_cast<double>(device_bytes_));
}

void Pool::set_memory_fraction(double fraction) {
  if (!(fraction >= 0.0 && fraction <= 1.0)) {
    throw ConfigError("a memory fraction must be from 0 to 1, got " + std::to_string(fraction));
  }
  const std::lock_guard lock(mutex_);
  memory_fraction_ = fraction;
}

double Pool::memory_fraction() const {
  const std::lock_guard lock(mutex_);
  return memory_fraction_;
}

}  // namespace spillover
