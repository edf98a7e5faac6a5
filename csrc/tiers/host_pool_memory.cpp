// Where a host pool's memory comes from and goes to: the budget, the machine, mapping and pinning.
// See host_pool.hpp.
#include <algorithm>
#include <new>
#include <string>
#include <utility>

#include "base/bytes.hpp"
#include "base/error.hpp"
#include "tiers/host_pool.hpp"
#include "tiers/numa.hpp"
#include "tiers/populate.hpp"

namespace spillover {
namespace {

// Left to the rest of the machine when no budget is set: running into the kernel's killer would end
// the training run without a word.
constexpr size_t kHeadroomBytes = 64 * kMiB;

// Idle memory that is kept for reuse beside an eighth of the peak use. Sizes that do not come back
// (sequences of varying length) would otherwise pile up until the budget or the machine is full.
constexpr size_t kIdleBytesMin = 64 * kMiB;

// Registrations of so much and more fail in NVIDIA's driver, whatever the machine has.
constexpr size_t kRegistrationBytesEnd = 512 * kGiB;

// For one more.
bool has_room(std::vector<HostMapping>& mappings) noexcept {
  if (mappings.size() < mappings.capacity()) return true;
  try {
    mappings.reserve(2 * mappings.size() + 8);
  } catch (const std::bad_alloc&) {
    return false;
  }
  return true;
}

}  // namespace

HostMapping HostPool::map(size_t size_bytes, PageSource source) {
  HostMappingOptions options;
  options.huge_pages = options_.huge_pages;
  options.source = source;
  options.numa_node = numa_node();
  HostMapping mapping(size_bytes, options);
  const Lock lock(mutex_);
  used_node_ = options.numa_node;
  numa_note_ = options.numa_node ? mapping.numa_note() : numa_problem_;
  return mapping;
}

// Does what the system may refuse, and again where idle memory can be given back first: it may be
// that of which there is too much.
template <class Step>
auto HostPool::with_idle_given_back(Victims victims, Step step) {
  try {
    return step();
  } catch (const HostOutOfMemoryError&) {
    if (give_back(SIZE_MAX, victims) == 0) throw;
  }
  return step();
}

// The bytes are counted by the claim.
HostMapping HostPool::make_mapping(const Claim& claimed, size_t size_bytes,
                                   size_t requested_bytes) {
  constexpr Victims kVictims = Victims::kIdleAndAhead;
  if (auto mapping = make_set_aside(size_bytes, kVictims, nullptr)) return std::move(*mapping);
  check_machine(claimed, size_bytes, requested_bytes, kVictims);
  HostMapping mapping = map_ordinary(size_bytes, kVictims);
  pin(mapping, kVictims);
  return mapping;
}

// missing_bytes are this one and those that come after it.
HostMapping HostPool::make_region(const Claim& claimed, size_t size_bytes, size_t missing_bytes,
                                  size_t requested_bytes, const Progress& progress) {
  constexpr Victims kVictims = Victims::kIdle;
  if (auto mapping = make_set_aside(size_bytes, kVictims, progress)) return std::move(*mapping);
  check_machine(claimed, missing_bytes, requested_bytes, kVictims);
  HostMapping mapping = map_ordinary(size_bytes, kVictims);
  PopulateOptions populating;
  populating.page_size =
      options_.huge_pages == HugePages::kNever ? PageSize::kSmall : PageSize::kHugeWhereItCan;
  populating.available = [&] { return left_for(claimed); };
  populating.floor_bytes = kHeadroomBytes / 2;
  populating.progress = progress;
  mapping.populate(populating);
  pin(mapping, kVictims);
  return mapping;
}

// From the stock of huge pages that the administrator has set aside, where it has so many. They are
// not in what the machine says to be available. A control group may allow fewer of them than there
// are, which shows when they are touched: by the kernel here, as a thread of ours would be killed.
std::optional<HostMapping> HostPool::make_set_aside(size_t size_bytes, Victims victims,
                                                    const Progress& progress) {
  if (options_.huge_pages != HugePages::kReserved || size_bytes % kHugePageBytes != 0) return {};
  std::optional<HostMapping> mapping;
  try {
    mapping.emplace(map(size_bytes, PageSource::kSetAside));
    PopulateOptions populating;
    populating.progress = progress;
    mapping->populate(populating);
  } catch (const HostOutOfMemoryError&) {
    return std::nullopt;  // Ordinary pages serve.
  }
  pin(*mapping, victims);
  return mapping;
}

HostMapping HostPool::map_ordinary(size_t size_bytes, Victims victims) {
  return with_idle_given_back(victims, [&] { return map(size_bytes, PageSource::kOrdinary); });
}

void HostPool::pin(HostMapping& mapping, Victims victims) {
  if (options_.pinning == Pinning::kPageable) return;
  try {
    with_idle_given_back(victims, [&] { mapping.pin(options_.device); });
  } catch (const HostOutOfMemoryError& error) {
    std::string message = error.what();
    const HostMemoryLimit left = available_host_memory(options_.system_root);
    if (left.bytes != SIZE_MAX) {
      message += "; " + left.source + " leaves this process " + format_bytes(left.bytes);
    }
    if (mapping.size_bytes() >= kRegistrationBytesEnd) {
      message += "; NVIDIA's driver pins less than " + format_bytes(kRegistrationBytesEnd) +
                 " at once: allocate smaller buffers";
    }
    throw HostOutOfMemoryError(message, error.requested_bytes());
  }
}

// Never fails: memory of another node works, at a lower speed.
std::optional<int> HostPool::numa_node() {
  std::call_once(numa_once_, [this] {
    if (options_.numa == NumaChoice::kNode) numa_node_ = options_.numa_node;
    if (options_.numa != NumaChoice::kNearest || options_.pinning == Pinning::kPageable) return;
    try {
      numa_node_ = nearest_numa_node(options_.device, options_.system_root);
    } catch (const Error& error) {
      numa_problem_ = std::string("the node nearest to the device is not known: ") + error.what();
    }
  });
  return numa_node_;
}

void HostPool::reserve(size_t size_bytes, const Progress& progress) {
  if (size_bytes == 0) throw ConfigError("reserve at least one byte");
  check_request(size_bytes);
  const size_t total_bytes = mapped_bytes_for(size_bytes, options_.huge_pages);
  // What was pinned ahead before is not given up for it: this is to be more.
  Claim claimed = claim(total_bytes, size_bytes, Victims::kIdle);
  std::vector<HostMapping> regions;
  size_t done_bytes = 0;
  size_t noted_bytes = 0;
  const auto note = [&](size_t region_done_bytes) {
    // Less than before where huge pages turned out to be too few.
    const size_t made_bytes = std::max(noted_bytes, done_bytes + region_done_bytes);
    claimed.note_made(made_bytes - noted_bytes);
    noted_bytes = made_bytes;
    if (progress) progress(std::min(made_bytes, size_bytes));
  };
  while (done_bytes < total_bytes) {
    const size_t missing_bytes = total_bytes - done_bytes;
    const size_t region_bytes = std::min(missing_bytes, options_.region_bytes_max);
    regions.push_back(make_region(claimed, region_bytes, missing_bytes, size_bytes, note));
    note(region_bytes);
    done_bytes += region_bytes;
  }
  const Lock lock(mutex_);
  for (HostMapping& region : regions) {
    const size_t region_bytes = region.size_bytes();
    regions_.add(std::move(region));
    claimed.keep(region_bytes);
  }
}

HostPool::Claim::~Claim() {
  const Lock lock(pool_.mutex_);
  pool_.pending_bytes_ -= pending_bytes_;
  if (claimed_bytes_ > 0) pool_.subtract_reserved(claimed_bytes_);
}

void HostPool::Claim::note_made(size_t size_bytes) {
  const Lock lock(pool_.mutex_);
  pending_bytes_ -= size_bytes;
  pool_.pending_bytes_ -= size_bytes;
}

void HostPool::Claim::keep(size_t size_bytes) noexcept {
  claimed_bytes_ -= size_bytes;
  const size_t made_bytes = std::min(pending_bytes_, size_bytes);
  pending_bytes_ -= made_bytes;
  pool_.pending_bytes_ -= made_bytes;
}

// What the machine leaves to this claim: others' threads may be about to touch what is available.
HostMemoryLimit HostPool::left_for(const Claim& claimed) const {
  HostMemoryLimit left = available_host_memory(options_.system_root);
  if (left.bytes == SIZE_MAX) return left;
  const Lock lock(mutex_);
  const size_t others_bytes = pending_bytes_ - claimed.pending_bytes();
  if (others_bytes == 0) return left;
  left.bytes -= std::min(left.bytes, others_bytes);
  left.source += ", less " + format_bytes(others_bytes) + " that other threads are about to take,";
  return left;
}

void HostPool::check_machine(const Claim& claimed, size_t size_bytes, size_t requested_bytes,
                             Victims victims) {
  HostMemoryLimit left = left_for(claimed);
  const auto fits = [&] { return left.bytes >= size_bytes + kHeadroomBytes; };
  if (!fits() && give_back(SIZE_MAX, victims) > 0) left = left_for(claimed);
  if (fits()) return;
  throw HostOutOfMemoryError(
      format_bytes(size_bytes) + " of host memory cannot be had: " + left.source +
          " leaves this process " + format_bytes(left.bytes) + ", of which " +
          format_bytes(kHeadroomBytes) +
          " are left alone. Offload less, use the disk tier, or raise that limit",
      requested_bytes);
}

// Counts size_bytes as reserved, giving memory that nobody uses back to the system where the budget
// asks for it.
HostPool::Claim HostPool::claim(size_t size_bytes, size_t requested_bytes, Victims victims) {
  Lock lock(mutex_);
  while (size_bytes > options_.limit_bytes - reserved_bytes_) {
    const size_t missing_bytes = size_bytes - (options_.limit_bytes - reserved_bytes_);
    std::vector<HostMapping> taken = take_idle(missing_bytes, victims);
    if (!taken.empty()) {
      lock.unlock();
      unmap(std::move(taken));
      lock.lock();
    } else if (unmapping_bytes_ > 0) {
      unmapped_.wait(lock);  // Another thread is at it.
    } else {
      throw_over_budget(size_bytes, requested_bytes);
    }
  }
  add_reserved(size_bytes);
  pending_bytes_ += size_bytes;
  return Claim(*this, size_bytes);
}

// Called when no idle mapping has the size that is asked for: the longest idle ones are unlikely to
// be asked for again.
void HostPool::give_back_surplus() {
  size_t surplus_bytes = 0;
  {
    const Lock lock(mutex_);
    const size_t kept_bytes = used_bytes_max_ / 8 + kIdleBytesMin;
    if (mappings_.idle_bytes() <= kept_bytes) return;
    surplus_bytes = mappings_.idle_bytes() - kept_bytes;
  }
  give_back(surplus_bytes, Victims::kIdle);
}

size_t HostPool::give_back(size_t wanted_bytes, Victims victims) {
  std::vector<HostMapping> taken;
  {
    const Lock lock(mutex_);
    taken = take_idle(wanted_bytes, victims);
  }
  return unmap(std::move(taken));
}

// Gives what take_idle() took back to the system; returns its bytes. The mutex must not be held.
size_t HostPool::unmap(std::vector<HostMapping> mappings) {
  size_t freed_bytes = 0;
  for (const HostMapping& mapping : mappings) freed_bytes += mapping.size_bytes();
  if (freed_bytes == 0) return 0;
  mappings.clear();
  const Lock lock(mutex_);
  // Only now: the budget holds for what is really mapped.
  unmapping_bytes_ -= freed_bytes;
  subtract_reserved(freed_bytes);
  unmapped_.notify_all();
  return freed_bytes;
}

// The longest idle mappings, slabs without a used slot and, where those may go, regions that
// nothing is carved from, of at least wanted_bytes where there are so many. They stay in
// reserved_bytes_.
std::vector<HostMapping> HostPool::take_idle(size_t wanted_bytes, Victims victims) {
  std::vector<HostMapping> taken;
  size_t taken_bytes = 0;
  // Without memory for the list fewer are taken.
  const auto wants_more = [&] { return taken_bytes < wanted_bytes && has_room(taken); };
  const auto take = [&](HostMapping&& mapping) {
    taken_bytes += mapping.size_bytes();
    unmapping_bytes_ += mapping.size_bytes();
    taken.push_back(std::move(mapping));
  };
  while (wants_more()) {
    auto mapping = mappings_.take_longest_idle();
    if (!mapping) break;
    take(std::move(*mapping));
  }
  for (auto it = slabs_.begin(); it != slabs_.end() && wants_more();) {
    Slab& slab = *it->second;
    const auto next = std::next(it);
    if (slab.mapping && slab.free_slots.size() == slab.slot_count) {
      take(std::move(*slab.mapping));
      remove_slab(it);
    }
    it = next;
  }
  while (victims == Victims::kIdleAndAhead && wants_more()) {
    auto region = regions_.take_free_region(wanted_bytes - taken_bytes);
    if (!region) break;
    take(std::move(*region));
  }
  return taken;
}

}  // namespace spillover
