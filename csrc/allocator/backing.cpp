#include "allocator/backing.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <exception>
#include <iterator>
#include <random>
#include <string>
#include <utility>

#include "allocator/expect.hpp"
#include "base/bytes.hpp"
#include "base/check.hpp"
#include "base/error.hpp"
#include "driver/context.hpp"
#include "driver/device.hpp"
#include "trace/span.hpp"

namespace spillover {
namespace {

// The unit where addresses are fixed: what cuMemAlloc rounds to.
constexpr size_t kFixedUnit = 2 * kMiB;
// Chunks are of one unit, the more of them are idle as a whole. What is mapped at once for one very
// large block comes and goes as one: there chunks are larger, so that sharing the block with
// another process does not take thousands of file descriptors.
constexpr size_t kLargeGrowth = 512 * kMiB;
constexpr size_t kLargeChunkUnits = 16;
// A larger cached chunk than is missing is taken up to this many times its size.
constexpr size_t kOvershoot = 4;

// Size of the next chunk to make for growth_bytes, of which missing_bytes are left to make.
size_t next_chunk_bytes(size_t growth_bytes, size_t missing_bytes, size_t unit_bytes) {
  const size_t large_bytes = kLargeChunkUnits * unit_bytes;
  return growth_bytes >= kLargeGrowth && missing_bytes >= large_bytes ? large_bytes : unit_bytes;
}

bool uses_virtual_memory(int device, VirtualMemory wanted) {
  if (wanted == VirtualMemory::kOff) return false;
  const bool has_it = supports_virtual_memory(device);
  if (wanted == VirtualMemory::kOn && !has_it) {
    throw ConfigError("device " + std::to_string(device) +
                      " has no virtual memory management, so virtual_memory=on is not possible; "
                      "use virtual_memory=auto");
  }
  return has_it;
}

constexpr TraceLabel kCreate{"cuMemCreate", "allocator"};
constexpr TraceLabel kMap{"cuMemMap", "allocator"};
constexpr TraceLabel kUnmap{"cuMemUnmap", "allocator"};
constexpr TraceLabel kRelease{"cuMemRelease", "allocator"};
constexpr TraceLabel kAllocate{"cuMemAlloc", "allocator"};
constexpr TraceLabel kMapped{"mapped", "allocator"};

// A driver may say that it has file handles and refuse them, where a virtual machine is restricted.
bool refuses_sharing(const DriverError& error) {
  constexpr int kInvalidValue = 1;
  constexpr int kNotPermitted = 800;
  constexpr int kNotSupported = 801;
  return error.code() == kInvalidValue || error.code() == kNotPermitted ||
         error.code() == kNotSupported;
}

FileDescriptor export_file(const PhysicalMemory& memory) {
  try {
    return memory.export_file();
  } catch (const Error&) {
    // Whatever the driver calls that.
    if (FileDescriptor(fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, 0)).is_open() || errno != EMFILE)
      throw;
  }
  throw StateError(
      "this process has no file descriptors left, and a block that is shared takes one for each "
      "2 MiB of it (32 MiB where 512 MiB or more were taken at once); raise the limit with "
      "`ulimit -n`");
}

// Numbers that no other process gives out, whatever its process number was.
uint64_t next_identity() {
  static const uint64_t process = std::random_device()() | uint64_t{std::random_device()()} << 32U;
  static std::atomic<uint64_t> count{0};
  return process + ++count;
}

}  // namespace

Backing::Backing(int device, VirtualMemory virtual_memory)
    : device_(device),
      is_virtual_(uses_virtual_memory(device, virtual_memory)),
      unit_bytes_(is_virtual_ ? std::max(allocation_granularity(device), kFixedUnit) : kFixedUnit),
      sharing_(is_virtual_ && supports_file_handles(device) ? PhysicalMemory::Sharing::kExportable
                                                            : PhysicalMemory::Sharing::kPrivate),
      space_(device, round_up(memory_info(device).total_bytes, unit_bytes_), unit_bytes_),
      devices_{device},
      track_(TrackKind::kCounter, "device memory " + std::to_string(device)) {}

DeviceAddress Backing::find_gap(const void* owner, size_t size_bytes) {
  return space_.find(owner, size_bytes);
}

std::optional<PhysicalMemory> Backing::create(size_t size_bytes) {
  const TraceSpan span(kCreate, size_bytes);
  if (sharing_ == PhysicalMemory::Sharing::kPrivate) {
    return PhysicalMemory::try_create(device_, size_bytes);
  }
  try {
    return PhysicalMemory::try_create(device_, size_bytes, sharing_);
  } catch (const DriverError& error) {
    if (!refuses_sharing(error)) throw;
  }
  auto memory = PhysicalMemory::try_create(device_, size_bytes);
  // So that was the reason: from now on nothing can be shared, and all else works.
  sharing_ = PhysicalMemory::Sharing::kPrivate;
  return memory;
}

std::optional<PhysicalMemory> Backing::take_cached(size_t size_bytes_max) {
  auto list = cached_.upper_bound(size_bytes_max);
  if (list == cached_.begin()) return std::nullopt;
  --list;
  PhysicalMemory memory = std::move(list->second.back());
  list->second.pop_back();
  if (list->second.empty()) cached_.erase(list);
  cached_bytes_ -= memory.size_bytes();
  return memory;
}

std::optional<PhysicalMemory> Backing::take_cached_larger(size_t size_bytes,
                                                          size_t size_bytes_max) {
  const auto list = cached_.upper_bound(size_bytes);
  if (list == cached_.end() || list->first > size_bytes_max) return std::nullopt;
  return take_cached(list->first);
}

void Backing::cache(PhysicalMemory memory) {
  const size_t size_bytes = memory.size_bytes();
  cached_[size_bytes].push_back(std::move(memory));
  cached_bytes_ += size_bytes;
}

// Chunks of together size_bytes, or up to room_bytes where that saves making one.
// growth_bytes decides on the size of those that are made.
bool Backing::gather(size_t size_bytes, size_t room_bytes, size_t created_bytes_max,
                     size_t growth_bytes, std::vector<PhysicalMemory>& chunks) {
  size_t gathered_bytes = 0;
  while (gathered_bytes < size_bytes) {
    const size_t missing_bytes = size_bytes - gathered_bytes;
    std::optional<PhysicalMemory> memory = take_cached(missing_bytes);
    if (!memory) {
      memory = take_cached_larger(
          missing_bytes, std::min(room_bytes - gathered_bytes, kOvershoot * missing_bytes));
    }
    if (!memory) {
      const size_t chunk_bytes = next_chunk_bytes(growth_bytes, missing_bytes, unit_bytes_);
      if (missing_bytes > created_bytes_max) return false;
      memory = create(chunk_bytes);
      if (!memory) return false;
      created_bytes_max -= chunk_bytes;
    }
    gathered_bytes += memory->size_bytes();
    chunks.push_back(std::move(*memory));
  }
  return true;
}

std::optional<AddressRange> Backing::map(DeviceAddress address, size_t size_bytes,
                                         size_t created_bytes_max) {
  std::vector<PhysicalMemory> chunks;
  try {
    if (gather(size_bytes, space_.gap_at(address), created_bytes_max, size_bytes, chunks)) {
      size_t gathered_bytes = 0;
      for (const PhysicalMemory& chunk : chunks) gathered_bytes += chunk.size_bytes();
      map_chunks(address, chunks, gathered_bytes);
      return AddressRange{address, address + gathered_bytes};
    }
  } catch (...) {
    for (PhysicalMemory& chunk : chunks) cache(std::move(chunk));
    throw;
  }
  for (PhysicalMemory& chunk : chunks) cache(std::move(chunk));
  return std::nullopt;
}

// All or nothing; what is mapped moves out of chunks.
void Backing::map_chunks(DeviceAddress address, std::vector<PhysicalMemory>& chunks,
                         size_t size_bytes) {
  const TraceSpan span(kMap, size_bytes);
  size_t mapped_bytes = 0;
  try {
    for (const PhysicalMemory& chunk : chunks) {
      map_memory(address + mapped_bytes, chunk);
      mapped_bytes += chunk.size_bytes();
    }
    allow_access(address, size_bytes, devices_);
  } catch (...) {
    if (mapped_bytes == 0) throw;
    try {
      unmap_memory(device_, address, mapped_bytes);
    } catch (const Error&) {
      // Nobody knows what is mapped there now: neither the addresses nor the chunks are used again.
      space_.take(address, size_bytes);
      space_.lose(address, size_bytes);
      chunks.clear();
    }
    throw;
  }
  space_.take(address, size_bytes);
  for (PhysicalMemory& chunk : chunks) {
    const size_t chunk_bytes = chunk.size_bytes();
    mapped_.emplace(address, Chunk{.size_bytes = chunk_bytes, .physical = std::move(chunk)});
    address += chunk_bytes;
  }
  chunks.clear();
  mapped_bytes_ += size_bytes;
  trace_mapped();
}

void Backing::trace_mapped() noexcept {
  if (trace_is_on()) trace_counter(kMapped, track_.get(), mapped_bytes_);
}

std::optional<AddressRange> Backing::allocate(size_t size_bytes) {
  const TraceSpan span(kAllocate, size_bytes);
  auto memory = DeviceMemory::try_allocate(device_, size_bytes);
  if (!memory) return std::nullopt;
  const DeviceAddress address = memory->address();
  mapped_.emplace(address, Chunk{.size_bytes = size_bytes, .fixed = std::move(*memory)});
  mapped_bytes_ += size_bytes;
  trace_mapped();
  return AddressRange{address, address + size_bytes};
}

AddressRange Backing::take_over(UpstreamMemory memory) {
  const DeviceAddress address = memory.address();
  const size_t size_bytes = memory.size_bytes();
  mapped_.emplace(address, Chunk{.size_bytes = size_bytes, .upstream = std::move(memory)});
  mapped_bytes_ += size_bytes;
  trace_mapped();
  upstream_bytes_ += size_bytes;
  return {address, address + size_bytes};
}

AddressRange Backing::chunks_within(const AddressRange& range) const {
  const auto first = mapped_.lower_bound(range.begin);
  if (first == mapped_.end() || first->first + first->second.size_bytes > range.end) return {};
  // The last chunk that starts in the range ends in it or reaches beyond it.
  auto last = std::prev(mapped_.lower_bound(range.end));
  if (last->first + last->second.size_bytes > range.end) --last;
  return {first->first, last->first + last->second.size_bytes};
}

AddressRange Backing::first_chunks(const AddressRange& chunks, size_t size_bytes) const {
  AddressRange first{chunks.begin, chunks.begin};
  while (first.size_bytes() < size_bytes && first.end < chunks.end) {
    first.end += mapped_.at(first.end).size_bytes;
  }
  return first;
}

void Backing::unmap(const AddressRange& chunks) {
  const ContextScope scope(
      device_);  // Where there is no context it throws before anything is done.
  const auto begin = mapped_.find(chunks.begin);
  const auto end = mapped_.lower_bound(chunks.end);
  std::vector<Chunk> taken;
  for (auto chunk = begin; chunk != end; ++chunk) {
    close_file(chunk->second);  // No block is live there, so every process has closed it.
    taken.push_back(std::move(chunk->second));
  }
  mapped_.erase(begin, end);
  mapped_bytes_ -= chunks.size_bytes();
  trace_mapped();
  // All are of one heap, hence of one kind.
  if (!taken.empty() && taken.front().upstream) {
    upstream_bytes_ -= chunks.size_bytes();
    for (Chunk& chunk : taken) returned_.push_back(std::move(*chunk.upstream));
    return;
  }
  if (!is_virtual_) {
    for (Chunk& chunk : taken) released_.push_back(std::move(*chunk.fixed));
    return;
  }
  const TraceSpan span(kUnmap, chunks.size_bytes());
  try {
    unmap_memory(device_, chunks.begin, chunks.size_bytes());
  } catch (const Error&) {
    space_.lose(chunks.begin, chunks.size_bytes());
    throw;
  }
  space_.give(chunks.begin, chunks.size_bytes());
  for (Chunk& chunk : taken) cache(std::move(*chunk.physical));
}

std::vector<DeviceMemory> Backing::take_released() {
  return std::exchange(released_, {});
}

std::vector<UpstreamMemory> Backing::take_returned() {
  return std::exchange(returned_, {});
}

void Backing::release_cached(size_t size_bytes) {
  std::exception_ptr failure;
  const size_t kept_bytes = cached_bytes_ - std::min(cached_bytes_, size_bytes);
  while (cached_bytes_ > kept_bytes) {
    std::optional<PhysicalMemory> memory = take_cached(kLargeChunkUnits * unit_bytes_);
    const TraceSpan span(kRelease, memory->size_bytes());
    try {
      memory->release();
    } catch (const Error&) {
      if (!failure) failure = std::current_exception();
    }
  }
  space_.release_unused();
  if (failure) std::rethrow_exception(failure);
}

void Backing::add_peer(int device) {
  if (std::find(devices_.begin(), devices_.end(), device) != devices_.end()) return;
  std::vector<int> devices = devices_;
  devices.push_back(device);
  if (is_virtual_) {
    for (const auto& [address, chunk] : mapped_) {
      if (chunk.is_mapped && chunk.physical) allow_access(address, chunk.size_bytes, devices);
    }
  }
  devices_ = std::move(devices);
}

SharedBlock Backing::share(const AddressRange& range) {
  SharedBlock shared;
  shared.process = getpid();
  auto chunk = std::prev(mapped_.upper_bound(range.begin));
  shared.offset_bytes = range.begin - chunk->first;
  if (chunk->second.upstream) return share_upstream(range);
  if (!is_virtual_) {
    shared.handle = interprocess_handle(device_, chunk->first);
    return shared;
  }
  for (; chunk != mapped_.end() && chunk->first < range.end; ++chunk) {
    Chunk& part = chunk->second;
    if (!part.file.is_open()) {
      if (sharing_ == PhysicalMemory::Sharing::kPrivate) {
        throw StateError("the driver of device " + std::to_string(device_) +
                         " does not give mapped memory to other processes; set "
                         "SPILLOVER_ALLOCATOR=virtual_memory=off, with which it can be shared");
      }
      part.file = export_file(*part.physical);
      part.identity = next_identity();
      ++file_count_;
    }
    shared.chunks.push_back({part.size_bytes, part.file.number(), part.identity});
  }
  return shared;
}

// An upstream may give parts of an allocation, and what is opened elsewhere is all of that.
SharedBlock Backing::share_upstream(const AddressRange& range) const {
  try {
    const DeviceAddress begin = allocation_start(device_, range.begin);
    return {.offset_bytes = range.begin - begin,
            .process = getpid(),
            .chunks = {},
            .handle = interprocess_handle(device_, begin)};
  } catch (const DriverError& error) {
    throw StateError(
        "memory from a private pool's own allocator can be shared with other "
        "processes where that takes it from cudaMalloc, and this is not such memory (" +
        std::string(error.what()) + "); send a copy that is not in that pool");
  }
}

void Backing::close_file(Chunk& chunk) {
  if (!chunk.file.is_open()) return;
  chunk.file.reset();
  --file_count_;
}

void Backing::close_files(const std::vector<AddressRange>& kept) {
  auto range = kept.begin();
  for (auto& [address, chunk] : mapped_) {
    while (range != kept.end() && range->end <= address) ++range;
    if (range == kept.end() || range->begin >= address + chunk.size_bytes) close_file(chunk);
  }
}

void Backing::check_invariants() const {
  size_t mapped_bytes = 0;
  size_t detached_bytes = 0;
  size_t asleep_bytes = 0;
  size_t upstream_bytes = 0;
  size_t files = 0;
  DeviceAddress end = 0;
  for (const auto& [address, chunk] : mapped_) {
    expect(address >= end, "two chunks overlap");
    expect(chunk.size_bytes > 0 && chunk.size_bytes % unit_bytes_ == 0,
           "the size of a chunk is no multiple of the unit");
    if (chunk.upstream) {
      expect(chunk.is_mapped && !chunk.physical && !chunk.fixed && !chunk.file.is_open(),
             "an upstream's chunk is of another kind, too");
      upstream_bytes += chunk.size_bytes;
    } else {
      expect(chunk.fixed.has_value() != is_virtual_ &&
                 (is_virtual_ ? chunk.physical.has_value() || !chunk.is_mapped
                              : chunk.is_mapped && !chunk.physical.has_value()),
             "a chunk is of the wrong kind for the device");
    }
    files += chunk.file.is_open() ? 1 : 0;
    expect(!chunk.physical || chunk.physical->size_bytes() == chunk.size_bytes,
           "a chunk's memory has another size than the chunk");
    expect(!chunk.is_mapped || !chunk.is_doubtful, "a chunk is mapped and in doubt");
    if (chunk.is_mapped) {
      mapped_bytes += chunk.size_bytes;
    } else {
      (chunk.physical ? detached_bytes : asleep_bytes) += chunk.size_bytes;
    }
    end = address + chunk.size_bytes;
  }
  expect(files == file_count_, "the files of shared chunks do not add up");
  expect(mapped_bytes == mapped_bytes_, "the mapped chunks do not add up");
  expect(detached_bytes == detached_bytes_, "the detached chunks do not add up");
  expect(asleep_bytes == asleep_bytes_, "the chunks that sleep do not add up");
  expect(upstream_bytes == upstream_bytes_, "the chunks of upstreams do not add up");
  size_t cached_bytes = 0;
  for (const auto& [size_bytes, memories] : cached_) {
    expect(!memories.empty(), "a list of cached chunks is empty");
    for (const PhysicalMemory& memory : memories) {
      expect(memory.size_bytes() == size_bytes, "a cached chunk is in the list of another size");
    }
    cached_bytes += size_bytes * memories.size();
  }
  expect(cached_bytes == cached_bytes_, "the cached chunks do not add up");
  expect(is_virtual_ || cached_bytes == 0, "a chunk at a fixed address is cached");
  const AddressSpace::Sums addresses = space_.check_invariants();
  expect(!is_virtual_ || addresses.reserved_bytes == addresses.gap_bytes + mapped_bytes -
                                                         upstream_bytes + detached_bytes +
                                                         asleep_bytes + addresses.lost_bytes,
         "gaps and chunks do not cover the reserved addresses");
  for (const auto& [address, chunk] : mapped_) {
    expect(space_.is_free_of_gaps(address, chunk.size_bytes), "a chunk is in a gap");
  }
}

}  // namespace spillover
