#include "tiers/host_pool.hpp"

#include <algorithm>
#include <atomic>
#include <bit>
#include <string>
#include <utility>

#include "base/bytes.hpp"
#include "base/check.hpp"
#include "base/error.hpp"
#include "driver/fork_guard.hpp"
#include "trace/span.hpp"

namespace spillover {
namespace {

constexpr TraceLabel kUsed{"used", "host"};
constexpr TraceLabel kReserved{"reserved", "host"};

std::string next_track_name() {
  static std::atomic<int> count{0};
  return "host pool " + std::to_string(++count);
}

size_t slot_bytes_for(size_t size_bytes) {
  if (size_bytes <= kKiB) return round_up(std::max<size_t>(size_bytes, 1), 64);
  return round_up(size_bytes, std::bit_floor(size_bytes - 1) / 8);
}

}  // namespace

HostBuffer::~HostBuffer() {
  if (pool_) pool_->release(address_, size_bytes_);
}

HostBuffer::HostBuffer(HostBuffer&& other) noexcept
    : pool_(std::move(other.pool_)),
      address_(std::exchange(other.address_, nullptr)),
      size_bytes_(std::exchange(other.size_bytes_, 0)) {}

HostBuffer& HostBuffer::operator=(HostBuffer&& other) noexcept {
  std::swap(pool_, other.pool_);
  std::swap(address_, other.address_);
  std::swap(size_bytes_, other.size_bytes_);
  return *this;
}

HostPool::HostPool(const HostPoolOptions& options)
    : options_(options),
      generation_(fork_generation()),
      track_(TrackKind::kCounter, next_track_name()) {}

std::shared_ptr<HostPool> HostPool::create(const HostPoolOptions& options) {
  return std::shared_ptr<HostPool>(new HostPool(options));
}

void HostPool::check_process() const {
  if (is_of_parent()) {
    throw StateError(
        "this host pool belongs to the process that made it, and this is a forked child: make a "
        "pool of its own there; where the parent has used CUDA, start the child with the 'spawn' "
        "method");
  }
}

void HostPool::check_request(size_t size_bytes) const {
  check_process();
  if (options_.pinning == Pinning::kPinned) check_not_forked();
  // Past the limit nothing can be had, and rounding must not overflow.
  if (size_bytes <= options_.limit_bytes && size_bytes <= SIZE_MAX / 2) return;
  const Lock lock(mutex_);
  throw_over_budget(size_bytes, size_bytes);
}

HostBuffer HostPool::allocate(size_t size_bytes) {
  if (size_bytes == 0) throw ConfigError("a host buffer must have at least one byte");
  check_request(size_bytes);
  return size_bytes < kSmallMax ? allocate_small(size_bytes) : allocate_large(size_bytes);
}

HostBuffer HostPool::allocate_large(size_t size_bytes) {
  const size_t mapped_bytes = mapped_bytes_for(size_bytes, options_.huge_pages);
  {
    const Lock lock(mutex_);
    if (std::byte* address = mappings_.take(mapped_bytes)) {
      add_used(mapped_bytes);
      return HostBuffer(shared_from_this(), address, size_bytes);
    }
    const size_t carved_bytes = round_up(size_bytes, host_page_bytes());
    if (std::byte* address = regions_.take(carved_bytes, HoleEnd::kLow)) {
      add_used(carved_bytes);
      return HostBuffer(shared_from_this(), address, size_bytes);
    }
  }
  give_back_surplus();
  Claim claimed = claim(mapped_bytes, size_bytes, Victims::kIdleAndAhead);
  HostMapping mapping = make_mapping(claimed, mapped_bytes, size_bytes);
  const Lock lock(mutex_);
  std::byte* address = mappings_.add(std::move(mapping));
  claimed.keep(mapped_bytes);
  add_used(mapped_bytes);
  return HostBuffer(shared_from_this(), address, size_bytes);
}

HostBuffer HostPool::allocate_small(size_t size_bytes) {
  const size_t slot_bytes = slot_bytes_for(size_bytes);
  {
    const Lock lock(mutex_);
    const auto found = slot_classes_.find(slot_bytes);
    if (found != slot_classes_.end() && !found->second.open.empty()) {
      return take_slot(*found->second.open.back(), size_bytes);
    }
  }
  auto slab = std::make_unique<Slab>(Slab{nullptr, {}, slot_bytes, kSlabBytes / slot_bytes, {}});
  slab->free_slots.reserve(slab->slot_count);
  for (size_t slot = slab->slot_count; slot > 0; --slot) {
    slab->free_slots.push_back(static_cast<uint32_t>(slot - 1));
  }
  {
    const Lock lock(mutex_);
    slab->address = regions_.take(kSlabBytes, HoleEnd::kHigh);
    if (slab->address != nullptr) return take_slot(add_slab(slab), size_bytes);
  }
  Claim claimed = claim(kSlabBytes, size_bytes, Victims::kIdleAndAhead);
  std::unique_ptr<Slab> mapped = std::move(slab);  // Goes before the claim.
  mapped->mapping.emplace(make_mapping(claimed, kSlabBytes, size_bytes));
  mapped->address = mapped->mapping->address();
  const Lock lock(mutex_);
  Slab& added = add_slab(mapped);
  claimed.keep(kSlabBytes);
  return take_slot(added, size_bytes);
}

// Called with the mutex held. Where it throws (std::bad_alloc), what was carved is back.
HostPool::Slab& HostPool::add_slab(std::unique_ptr<Slab>& slab) {
  Slab& added = *slab;
  try {
    SlotClass& slots = slot_classes_[added.slot_bytes];
    slots.open.reserve(slots.slab_count + 1);
    slabs_.emplace(added.address, std::move(slab));
    ++slots.slab_count;
    slots.open.push_back(&added);
    return added;
  } catch (...) {
    if (!added.mapping) regions_.give_back(added.address);
    throw;
  }
}

HostBuffer HostPool::take_slot(Slab& slab, size_t size_bytes) {
  const size_t slot = slab.free_slots.back();
  slab.free_slots.pop_back();
  if (slab.free_slots.empty()) {
    auto& open = slot_classes_.at(slab.slot_bytes).open;
    open.erase(std::find(open.begin(), open.end(), &slab));
  }
  add_used(slab.slot_bytes);
  return HostBuffer(shared_from_this(), slab.address + slot * slab.slot_bytes, size_bytes);
}

void HostPool::release(std::byte* address, size_t size_bytes) noexcept {
  if (is_of_parent()) return;
  const Lock lock(mutex_);
  --buffer_count_;
  if (size_bytes < kSmallMax) return release_slot(address, size_bytes);
  const bool is_own = mappings_.owns(address);
  subtract_used(is_own ? mappings_.give_back(address) : regions_.give_back(address));
}

void HostPool::release_slot(std::byte* address, size_t size_bytes) noexcept {
  const auto after = slabs_.upper_bound(address);
  SPILLOVER_CHECK(after != slabs_.begin(), "a host buffer came back to a pool that never gave it");
  const auto found = std::prev(after);
  Slab& slab = *found->second;
  const auto offset = static_cast<size_t>(address - slab.address);
  SPILLOVER_CHECK(offset < kSlabBytes && offset % slab.slot_bytes == 0 &&
                      slab.free_slots.size() < slab.slot_count && size_bytes <= slab.slot_bytes,
                  "a host buffer does not fit its slab");
  subtract_used(slab.slot_bytes);
  slab.free_slots.push_back(static_cast<uint32_t>(offset / slab.slot_bytes));
  if (slab.free_slots.size() == 1) slot_classes_.at(slab.slot_bytes).open.push_back(&slab);
  // One that was carved goes back at once: it may part what a large block wants, and is soon carved
  // again.
  if (!slab.mapping && slab.free_slots.size() == slab.slot_count) remove_slab(found);
}

// One without a used slot. Its mapping, where it has one, is the caller's.
void HostPool::remove_slab(Slabs::iterator found) noexcept {
  Slab& slab = *found->second;
  SlotClass& slots = slot_classes_.at(slab.slot_bytes);
  slots.open.erase(std::find(slots.open.begin(), slots.open.end(), &slab));
  --slots.slab_count;
  if (regions_.owns(slab.address)) regions_.give_back(slab.address);
  slabs_.erase(found);
}

size_t HostPool::trim() {
  if (is_of_parent()) return 0;
  return give_back(SIZE_MAX, Victims::kIdleAndAhead);
}

HostStats HostPool::stats() const {
  check_process();
  const Lock lock(mutex_);
  HostStats stats{};
  stats.used_bytes = used_bytes_;
  stats.used_bytes_max = used_bytes_max_;
  stats.reserved_bytes = reserved_bytes_;
  stats.reserved_bytes_max = reserved_bytes_max_;
  stats.limit_bytes = options_.limit_bytes;
  stats.buffer_count = buffer_count_;
  stats.ahead_bytes = regions_.free_bytes();
  stats.huge_page_bytes = mappings_.huge_page_bytes() + regions_.huge_page_bytes();
  stats.numa_node = used_node_;
  stats.numa_note = numa_note_;
  return stats;
}

bool HostPool::is_valid() const {
  const Lock lock(mutex_);
  size_t slab_bytes = 0;
  for (const auto& [address, slab] : slabs_) {
    if (slab->mapping) slab_bytes += kSlabBytes;
    if (!slab->mapping && !regions_.owns(address)) return false;
  }
  const size_t held_bytes = mappings_.size_bytes() + regions_.size_bytes() + slab_bytes;
  return regions_.is_valid() && used_bytes_ <= held_bytes &&
         held_bytes + unmapping_bytes_ <= reserved_bytes_ &&
         reserved_bytes_ <= options_.limit_bytes && pending_bytes_ <= reserved_bytes_;
}

void HostPool::add_used(size_t size_bytes) noexcept {
  used_bytes_ += size_bytes;
  used_bytes_max_ = std::max(used_bytes_max_, used_bytes_);
  ++buffer_count_;
  if (trace_is_on()) trace_counter(kUsed, track_.get(), used_bytes_);
}

void HostPool::subtract_used(size_t size_bytes) noexcept {
  used_bytes_ -= size_bytes;
  if (trace_is_on()) trace_counter(kUsed, track_.get(), used_bytes_);
}

void HostPool::add_reserved(size_t size_bytes) noexcept {
  reserved_bytes_ += size_bytes;
  reserved_bytes_max_ = std::max(reserved_bytes_max_, reserved_bytes_);
  if (trace_is_on()) trace_counter(kReserved, track_.get(), reserved_bytes_);
}

void HostPool::subtract_reserved(size_t size_bytes) noexcept {
  reserved_bytes_ -= size_bytes;
  if (trace_is_on()) trace_counter(kReserved, track_.get(), reserved_bytes_);
}

// Called with the mutex held.
void HostPool::throw_over_budget(size_t size_bytes, size_t requested_bytes) const {
  const bool is_given = options_.limit_source.empty();
  std::string message = "the host memory budget of " + format_bytes(options_.limit_bytes);
  if (!is_given) message += ", most of " + options_.limit_source + ",";
  message += " does not allow " + format_bytes(size_bytes) + " more: " + format_bytes(used_bytes_) +
             " are in use";
  if (regions_.free_bytes() > 0) {
    message += ", and " + format_bytes(regions_.free_bytes()) +
               " that were pinned ahead are not (" + format_bytes(regions_.largest_free_bytes()) +
               " of them in one piece)";
  }
  message += is_given
                 ? ". Raise the budget (limit=, host=, or SPILLOVER_HOST_LIMIT), offload less, "
                 : ". Offload less, ";
  throw HostOutOfMemoryError(message + "or use the disk tier", requested_bytes);
}

}  // namespace spillover
