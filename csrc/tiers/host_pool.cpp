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
#include "tiers/numa.hpp"
#include "tiers/populate.hpp"
#include "tiers/system_memory.hpp"
#include "trace/span.hpp"

namespace spillover {
namespace {

// Left to the rest of the machine when no budget is set: running into the kernel's killer would end
// the training run without a word.
constexpr size_t kHeadroomBytes = 64 * kMiB;

// Idle memory that is kept for reuse beside an eighth of the peak use. Sizes that do not come back
// (sequences of varying length) would otherwise pile up until the budget or the machine is full.
constexpr size_t kIdleBytesMin = 64 * kMiB;

// Of one registration of memory that is pinned ahead. Larger buffers get a mapping of their own.
constexpr size_t kRegionBytesMax = size_t{4} << 30;

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
    : options_(options), track_(TrackKind::kCounter, next_track_name()) {}

// The caller holds the mutex.
void HostPool::trace_used() noexcept {
  if (trace_is_on()) trace_counter(kUsed, track_.get(), used_bytes_);
}

void HostPool::trace_reserved() noexcept {
  if (trace_is_on()) trace_counter(kReserved, track_.get(), reserved_bytes_);
}

std::shared_ptr<HostPool> HostPool::create(const HostPoolOptions& options) {
  return std::shared_ptr<HostPool>(new HostPool(options));
}

HostBuffer HostPool::allocate(size_t size_bytes) {
  if (size_bytes == 0) throw ConfigError("a host buffer must have at least one byte");
  // Past the limit nothing can be had, and the rounding below must not overflow.
  if (size_bytes > options_.limit_bytes || size_bytes > SIZE_MAX / 2) {
    const std::lock_guard lock(mutex_);
    throw_over_budget(size_bytes, size_bytes);
  }
  if (options_.pinning == Pinning::kPinned) check_not_forked();
  return size_bytes < kSmallMax ? allocate_small(size_bytes) : allocate_large(size_bytes);
}

HostBuffer HostPool::allocate_large(size_t size_bytes) {
  const size_t mapped_bytes = mapped_bytes_for(size_bytes, options_.huge_pages);
  {
    const std::lock_guard lock(mutex_);
    if (const auto found = idle_by_size_.find(mapped_bytes); found != idle_by_size_.end()) {
      const auto entry = found->second;
      idle_by_size_.erase(found);
      std::byte* address = entry->address();
      in_use_.emplace(address, std::move(*entry));
      idle_.erase(entry);
      add_used(mapped_bytes);
      return HostBuffer(shared_from_this(), address, size_bytes);
    }
    const size_t carved_bytes = round_up(size_bytes, host_page_bytes());
    if (std::byte* address = regions_.take(carved_bytes)) {
      carved_.emplace(address, carved_bytes);
      add_used(carved_bytes);
      return HostBuffer(shared_from_this(), address, size_bytes);
    }
  }
  give_back_surplus();
  HostMapping mapping = map(mapped_bytes, size_bytes);
  std::byte* address = mapping.address();
  const std::lock_guard lock(mutex_);
  in_use_.emplace(address, std::move(mapping));
  add_used(mapped_bytes);
  return HostBuffer(shared_from_this(), address, size_bytes);
}

HostBuffer HostPool::allocate_small(size_t size_bytes) {
  const size_t slot_bytes = slot_bytes_for(size_bytes);
  {
    const std::lock_guard lock(mutex_);
    auto& open = open_slabs_[slot_bytes];
    if (!open.empty()) return take_slot(*open.back(), size_bytes);
  }
  auto slab = std::make_unique<Slab>(Slab{nullptr, {}, slot_bytes, {}, kSlabBytes / slot_bytes});
  {
    const std::lock_guard lock(mutex_);
    slab->address = regions_.take(kSlabBytes);
  }
  if (slab->address == nullptr) {
    slab->mapping.emplace(map(kSlabBytes, size_bytes));
    slab->address = slab->mapping->address();
  }
  slab->free_slots.reserve(slab->slot_count);
  for (size_t slot = slab->slot_count; slot > 0; --slot) {
    slab->free_slots.push_back(static_cast<uint32_t>(slot - 1));
  }
  const std::lock_guard lock(mutex_);
  Slab& added = *slab;
  slabs_.emplace(added.address, std::move(slab));
  open_slabs_[slot_bytes].push_back(&added);
  return take_slot(added, size_bytes);
}

HostBuffer HostPool::take_slot(Slab& slab, size_t size_bytes) {
  const size_t slot = slab.free_slots.back();
  slab.free_slots.pop_back();
  if (slab.free_slots.empty()) {
    auto& open = open_slabs_[slab.slot_bytes];
    open.erase(std::find(open.begin(), open.end(), &slab));
  }
  add_used(slab.slot_bytes);
  return HostBuffer(shared_from_this(), slab.address + slot * slab.slot_bytes, size_bytes);
}

void HostPool::release(std::byte* address, size_t size_bytes) noexcept {
  // Another thread of the parent may have held the lock at the fork; the child's copy of the pool
  // is never used again.
  if (in_forked_child()) return;
  const std::lock_guard lock(mutex_);
  --buffer_count_;
  if (const auto found = in_use_.find(address); found != in_use_.end()) {
    used_bytes_ -= found->second.size_bytes();
    trace_used();
    const auto entry = idle_.insert(idle_.end(), std::move(found->second));
    in_use_.erase(found);
    idle_by_size_.emplace(entry->size_bytes(), entry);
    return;
  }
  if (const auto found = carved_.find(address); found != carved_.end()) {
    used_bytes_ -= found->second;
    trace_used();
    regions_.give_back(address, found->second);
    carved_.erase(found);
    return;
  }
  auto after = slabs_.upper_bound(address);
  SPILLOVER_CHECK(after != slabs_.begin(), "a host buffer came back to a pool that never gave it");
  Slab& slab = *std::prev(after)->second;
  const size_t offset = static_cast<size_t>(address - slab.address);
  SPILLOVER_CHECK(offset < kSlabBytes && offset % slab.slot_bytes == 0 &&
                      slab.free_slots.size() < slab.slot_count && size_bytes <= slab.slot_bytes,
                  "a host buffer does not fit its slab");
  used_bytes_ -= slab.slot_bytes;
  trace_used();
  slab.free_slots.push_back(static_cast<uint32_t>(offset / slab.slot_bytes));
  if (slab.free_slots.size() == 1) open_slabs_[slab.slot_bytes].push_back(&slab);
}

// Returns memory that is counted in reserved_bytes_ but held by the caller.
HostMapping HostPool::map(size_t size_bytes, size_t requested_bytes) {
  {
    std::unique_lock lock(mutex_);
    count_reserved(lock, size_bytes, requested_bytes);
  }
  try {
    check_machine(size_bytes, requested_bytes);
    return make_mapping(size_bytes, nullptr);
  } catch (...) {
    const std::lock_guard lock(mutex_);
    reserved_bytes_ -= size_bytes;
    trace_reserved();
    throw;
  }
}

HostMapping HostPool::make_mapping(size_t size_bytes,
                                   const std::function<size_t(std::byte*)>& touch) {
  HostMappingOptions options;
  options.pinning = options_.pinning;
  options.device = options_.device;
  options.huge_pages = options_.huge_pages;
  options.numa_node = numa_node();
  HostMapping mapping(size_bytes, options, touch);
  const std::lock_guard lock(mutex_);
  huge_page_bytes_ += mapping.huge_page_bytes();
  used_node_ = options.numa_node;
  numa_note_ = mapping.numa_note();
  return mapping;
}

// Found out when it is first needed: a pool without memory needs no driver.
std::optional<int> HostPool::numa_node() {
  std::call_once(numa_once_, [this] {
    if (options_.numa == NumaChoice::kNode) numa_node_ = options_.numa_node;
    if (options_.numa == NumaChoice::kNearest && options_.pinning == Pinning::kPinned) {
      numa_node_ = nearest_numa_node(options_.device);
    }
  });
  return numa_node_;
}

void HostPool::reserve(size_t size_bytes, const std::function<void(size_t)>& progress) {
  if (size_bytes == 0) throw ConfigError("reserve at least one byte");
  if (size_bytes > options_.limit_bytes || size_bytes > SIZE_MAX / 2) {
    const std::lock_guard lock(mutex_);
    throw_over_budget(size_bytes, size_bytes);
  }
  if (options_.pinning == Pinning::kPinned) check_not_forked();
  const size_t total_bytes = mapped_bytes_for(size_bytes, options_.huge_pages);
  {
    std::unique_lock lock(mutex_);
    count_reserved(lock, total_bytes, size_bytes);
  }
  const PageSize page_size =
      options_.huge_pages == HugePages::kNever ? PageSize::kSmall : PageSize::kHugeWhereItCan;
  std::vector<HostMapping> regions;
  try {
    check_machine(total_bytes, size_bytes);
    for (size_t done_bytes = 0; done_bytes < total_bytes;) {
      const size_t region_bytes = std::min(total_bytes - done_bytes, kRegionBytesMax);
      regions.push_back(make_mapping(region_bytes, [&](std::byte* address) {
        return populate(address, region_bytes, page_size, [&](size_t region_done_bytes) {
          if (progress) progress(done_bytes + region_done_bytes);
        });
      }));
      done_bytes += region_bytes;
      if (progress) progress(done_bytes);
    }
  } catch (...) {
    size_t made_bytes = 0;
    for (const HostMapping& region : regions) made_bytes += region.size_bytes();
    unmap(std::move(regions));
    const std::lock_guard lock(mutex_);
    reserved_bytes_ -= total_bytes - made_bytes;
    trace_reserved();
    throw;
  }
  const std::lock_guard lock(mutex_);
  for (HostMapping& region : regions) regions_.add(std::move(region));
}

void HostPool::check_machine(size_t size_bytes, size_t requested_bytes) {
  HostMemoryLimit available = available_host_memory();
  const auto fits = [&] { return available.bytes >= size_bytes + kHeadroomBytes; };
  if (!fits() && trim() > 0) available = available_host_memory();
  if (fits()) return;
  throw HostOutOfMemoryError(
      format_bytes(size_bytes) + " of host memory cannot be had: " + available.source +
          " leaves this process " + format_bytes(available.bytes) + ", of which " +
          format_bytes(kHeadroomBytes) +
          " are left alone. Offload less, use the disk tier, or raise that limit",
      requested_bytes);
}

// Counts size_bytes as reserved, giving idle memory back to the system where the budget asks for
// it.
void HostPool::count_reserved(std::unique_lock<std::mutex>& lock, size_t size_bytes,
                              size_t requested_bytes) {
  while (size_bytes > options_.limit_bytes - reserved_bytes_) {
    const size_t missing_bytes = size_bytes - (options_.limit_bytes - reserved_bytes_);
    std::vector<HostMapping> victims = take_idle(missing_bytes);
    if (victims.empty()) throw_over_budget(size_bytes, requested_bytes);
    lock.unlock();
    unmap(std::move(victims));
    lock.lock();
  }
  reserved_bytes_ += size_bytes;
  trace_reserved();
  reserved_bytes_max_ = std::max(reserved_bytes_max_, reserved_bytes_);
}

// Called when no idle mapping has the size that is asked for: the longest idle ones are unlikely to
// be asked for again.
void HostPool::give_back_surplus() {
  std::vector<HostMapping> victims;
  {
    const std::lock_guard lock(mutex_);
    const size_t idle_bytes = reserved_bytes_ - used_bytes_ - regions_.free_bytes();
    const size_t kept_bytes = used_bytes_max_ / 8 + kIdleBytesMin;
    if (idle_bytes <= kept_bytes) return;
    victims = take_idle(idle_bytes - kept_bytes);
  }
  unmap(std::move(victims));
}

// Gives what take_idle() took back to the system; returns its bytes. The mutex must not be held.
size_t HostPool::unmap(std::vector<HostMapping> victims) {
  size_t freed_bytes = 0;
  size_t huge_bytes = 0;
  for (const HostMapping& victim : victims) {
    freed_bytes += victim.size_bytes();
    huge_bytes += victim.huge_page_bytes();
  }
  victims.clear();
  const std::lock_guard lock(mutex_);
  huge_page_bytes_ -= huge_bytes;
  // Only now: the budget holds for what is really mapped.
  reserved_bytes_ -= freed_bytes;
  trace_reserved();
  return freed_bytes;
}

// The longest idle mappings, slabs without a used slot, and last what was pinned ahead and is not
// in use, of at least wanted_bytes where there are so many. They stay in reserved_bytes_.
std::vector<HostMapping> HostPool::take_idle(size_t wanted_bytes) {
  std::vector<HostMapping> taken;
  size_t taken_bytes = 0;
  while (taken_bytes < wanted_bytes && !idle_.empty()) {
    const auto entry = idle_.begin();
    auto [first, last] = idle_by_size_.equal_range(entry->size_bytes());
    const auto found = std::find_if(first, last, [&](auto& item) { return item.second == entry; });
    SPILLOVER_CHECK(found != last, "an idle mapping is missing from the index");
    idle_by_size_.erase(found);
    taken_bytes += entry->size_bytes();
    taken.push_back(std::move(*entry));
    idle_.erase(entry);
  }
  for (auto it = slabs_.begin(); it != slabs_.end() && taken_bytes < wanted_bytes;) {
    Slab& slab = *it->second;
    if (slab.free_slots.size() < slab.slot_count) {
      ++it;
      continue;
    }
    auto& open = open_slabs_[slab.slot_bytes];
    open.erase(std::find(open.begin(), open.end(), &slab));
    if (slab.mapping) {
      taken_bytes += kSlabBytes;
      taken.push_back(std::move(*slab.mapping));
    } else {
      regions_.give_back(slab.address, kSlabBytes);
    }
    it = slabs_.erase(it);
  }
  while (taken_bytes < wanted_bytes) {
    std::optional<HostMapping> region = regions_.take_free_region(wanted_bytes - taken_bytes);
    if (!region) break;
    taken_bytes += region->size_bytes();
    taken.push_back(std::move(*region));
  }
  return taken;
}

size_t HostPool::trim() {
  if (in_forked_child()) return 0;
  std::vector<HostMapping> victims;
  {
    const std::lock_guard lock(mutex_);
    victims = take_idle(SIZE_MAX);
  }
  return unmap(std::move(victims));
}

HostStats HostPool::stats() const {
  const std::lock_guard lock(mutex_);
  HostStats stats{};
  stats.used_bytes = used_bytes_;
  stats.used_bytes_max = used_bytes_max_;
  stats.reserved_bytes = reserved_bytes_;
  stats.reserved_bytes_max = reserved_bytes_max_;
  stats.limit_bytes = options_.limit_bytes;
  stats.buffer_count = buffer_count_;
  stats.ahead_bytes = regions_.free_bytes();
  stats.huge_page_bytes = huge_page_bytes_;
  stats.numa_node = used_node_;
  stats.numa_note = numa_note_;
  return stats;
}

void HostPool::add_used(size_t size_bytes) {
  used_bytes_ += size_bytes;
  used_bytes_max_ = std::max(used_bytes_max_, used_bytes_);
  trace_used();
  ++buffer_count_;
}

void HostPool::throw_over_budget(size_t size_bytes, size_t requested_bytes) const {
  const bool is_given = options_.limit_source.empty();
  throw HostOutOfMemoryError(
      "the host memory budget of " + format_bytes(options_.limit_bytes) +
          (is_given ? "" : ", most of " + options_.limit_source + ",") + " does not allow " +
          format_bytes(size_bytes) + " more: " + format_bytes(used_bytes_) + " are in use. " +
          (is_given ? "Raise the budget (limit=, host=, or SPILLOVER_HOST_LIMIT), offload less, "
                    : "Offload less, ") +
          "or use the disk tier",
      requested_bytes);
}

}  // namespace spillover
