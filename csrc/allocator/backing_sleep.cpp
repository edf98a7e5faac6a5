// Chunks that keep their addresses and give up their memory: Note [Chunks that sleep].
#include <limits>
#include <utility>

#include "allocator/backing.hpp"
#include "base/check.hpp"
#include "base/error.hpp"
#include "driver/context.hpp"

namespace spillover {

void Backing::set_doubtful(const AddressRange& range, bool is_doubtful) {
  for (auto chunk = mapped_.lower_bound(range.begin);
       chunk != mapped_.end() && chunk->first < range.end; ++chunk) {
    chunk->second.is_doubtful = is_doubtful;
  }
}

// Makes sure that nothing is mapped where an unmapping failed.
void Backing::clear_doubts(const AddressRange& range) {
  for (auto chunk = mapped_.lower_bound(range.begin);
       chunk != mapped_.end() && chunk->first < range.end; ++chunk) {
    if (!chunk->second.is_doubtful) continue;
    try {
      unmap_memory(device_, chunk->first, chunk->second.size_bytes);
    } catch (const Error&) {
      // Most often because nothing was mapped; if it was, the mapping that follows tells.
    }
    chunk->second.is_doubtful = false;
  }
}

void Backing::detach(const AddressRange& chunks) {
  const ContextScope scope(device_);  // Throws before anything is done.
  for (auto chunk = mapped_.find(chunks.begin); chunk != mapped_.end() && chunk->first < chunks.end;
       ++chunk) {
    SPILLOVER_CHECK(chunk->second.is_mapped, "a chunk that is not mapped was about to be detached");
    chunk->second.is_mapped = false;
  }
  mapped_bytes_ -= chunks.size_bytes();
  trace_mapped();
  detached_bytes_ += chunks.size_bytes();
  set_doubtful(chunks, true);
  unmap_memory(device_, chunks.begin, chunks.size_bytes());
  set_doubtful(chunks, false);
}

void Backing::attach(const AddressRange& range) {
  clear_doubts(range);
  const auto begin = mapped_.lower_bound(range.begin);
  const auto is_detached = [](const Chunk& chunk) { return !chunk.is_mapped && chunk.physical; };
  for (auto chunk = begin; chunk != mapped_.end() && chunk->first < range.end; ++chunk) {
    if (!is_detached(chunk->second)) continue;
    chunk->second.is_doubtful = true;
    map_memory(chunk->first, *chunk->second.physical);
    allow_access(chunk->first, chunk->second.size_bytes, devices_);
  }
  for (auto chunk = begin; chunk != mapped_.end() && chunk->first < range.end; ++chunk) {
    if (!is_detached(chunk->second)) continue;
    chunk->second.is_mapped = true;
    chunk->second.is_doubtful = false;
    mapped_bytes_ += chunk->second.size_bytes;
    detached_bytes_ -= chunk->second.size_bytes;
  }
  trace_mapped();
}

// The range has no chunks any more and gets some that sleep.
void Backing::make_asleep(const AddressRange& range, bool is_doubtful) {
  for (DeviceAddress address = range.begin; address < range.end; address += unit_bytes_) {
    mapped_.emplace(
        address, Chunk{.size_bytes = unit_bytes_, .is_mapped = false, .is_doubtful = is_doubtful});
  }
  asleep_bytes_ += range.size_bytes();
}

std::vector<PhysicalMemory> Backing::take_detached(const AddressRange& chunks) {
  std::vector<PhysicalMemory> taken;
  const auto begin = mapped_.find(chunks.begin);
  auto chunk = begin;
  for (; chunk != mapped_.end() && chunk->first < chunks.end; ++chunk) {
    SPILLOVER_CHECK(
        !chunk->second.is_mapped && chunk->second.physical && !chunk->second.is_doubtful,
        "a chunk that is mapped was about to give up its memory");
    close_file(chunk->second);  // Of a block that is live no more.
    taken.push_back(std::move(*chunk->second.physical));
  }
  mapped_.erase(begin, chunk);
  detached_bytes_ -= chunks.size_bytes();
  make_asleep(chunks, false);
  return taken;
}

bool Backing::provide(const AddressRange& chunks, size_t created_bytes_max) {
  const size_t size_bytes = chunks.size_bytes();
  std::vector<PhysicalMemory> memory;
  // What sleeps was wanted for long: it gets large chunks, which cost fewer driver calls.
  constexpr size_t kLarge = std::numeric_limits<size_t>::max();
  bool is_enough = false;
  try {
    is_enough = gather(size_bytes, size_bytes, created_bytes_max, kLarge, memory);
    if (is_enough) map_provided(chunks, memory);
  } catch (...) {
    for (PhysicalMemory& rest : memory) cache(std::move(rest));
    throw;
  }
  for (PhysicalMemory& rest : memory) cache(std::move(rest));
  return is_enough;
}

// All or nothing; what is mapped, or may be, moves out of chunks.
void Backing::map_provided(const AddressRange& range, std::vector<PhysicalMemory>& chunks) {
  clear_doubts(range);
  DeviceAddress end = range.begin;
  try {
    for (const PhysicalMemory& chunk : chunks) {
      map_memory(end, chunk);
      end += chunk.size_bytes();
    }
    allow_access(range.begin, range.size_bytes(), devices_);
  } catch (...) {
    if (end == range.begin) throw;
    try {
      unmap_memory(device_, range.begin, end - range.begin);
    } catch (const Error&) {
      // Nobody knows what is mapped there now: the memory is not used again, the addresses are.
      set_doubtful({range.begin, end}, true);
      chunks.clear();
    }
    throw;
  }
  mapped_.erase(mapped_.find(range.begin), mapped_.lower_bound(range.end));
  DeviceAddress address = range.begin;
  for (PhysicalMemory& chunk : chunks) {
    const size_t chunk_bytes = chunk.size_bytes();
    mapped_.emplace(address, Chunk{.size_bytes = chunk_bytes, .physical = std::move(chunk)});
    address += chunk_bytes;
  }
  chunks.clear();
  asleep_bytes_ -= range.size_bytes();
  mapped_bytes_ += range.size_bytes();
  trace_mapped();
}

void Backing::withdraw(const AddressRange& chunks) noexcept {
  std::vector<PhysicalMemory> taken;
  const auto begin = mapped_.find(chunks.begin);
  auto chunk = begin;
  for (; chunk != mapped_.end() && chunk->first < chunks.end; ++chunk) {
    taken.push_back(std::move(*chunk->second.physical));
  }
  mapped_.erase(begin, chunk);
  mapped_bytes_ -= chunks.size_bytes();
  trace_mapped();
  make_asleep(chunks, true);
  try {
    unmap_memory(device_, chunks.begin, chunks.size_bytes());
  } catch (const Error&) {
    return;  // The memory may be mapped still: it goes back to the driver and is not used again.
  }
  set_doubtful(chunks, false);
  for (PhysicalMemory& memory : taken) cache(std::move(memory));
}

void Backing::forget(const AddressRange& chunks) {
  auto chunk = mapped_.find(chunks.begin);
  while (chunk != mapped_.end() && chunk->first < chunks.end) {
    const auto& [address, sleeper] = *chunk;
    if (sleeper.is_doubtful) {
      space_.lose(address, sleeper.size_bytes);
    } else {
      space_.give(address, sleeper.size_bytes);
    }
    asleep_bytes_ -= sleeper.size_bytes;
    chunk = mapped_.erase(chunk);
  }
}

std::vector<AddressRange> Backing::chunks_in(const AddressRange& range) const {
  std::vector<AddressRange> chunks;
  for (auto chunk = mapped_.lower_bound(range.begin);
       chunk != mapped_.end() && chunk->first < range.end; ++chunk) {
    chunks.push_back({chunk->first, chunk->first + chunk->second.size_bytes});
  }
  return chunks;
}

size_t Backing::asleep_bytes_in(const AddressRange& range) const {
  size_t sum_bytes = 0;
  for (auto chunk = mapped_.lower_bound(range.begin);
       chunk != mapped_.end() && chunk->first < range.end; ++chunk) {
    if (!chunk->second.is_mapped && !chunk->second.physical) sum_bytes += chunk->second.size_bytes;
  }
  return sum_bytes;
}

}  // namespace spillover
