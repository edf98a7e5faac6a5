// Has the system give all pages of a range, zeroed, before somebody waits for them one by one.
//
// Note [Huge pages of shared memory]. The kernel makes huge pages of shared memory by itself only
// where an administrator allowed it (shmem_enabled), which is off on most machines; without them
// disks and links spend their time on page tables. MADV_COLLAPSE (Linux 6.1) asks for one range in
// spite of that setting: its first page is made, and the kernel puts a huge one in its place. Where
// it refuses a few times (no such call, no memory in one piece), pages are small.
//
// Note [Watching what is left]. Others take memory while pages are made, and where the machine or a
// control group has none left the kernel kills somebody without a word. So threads claim each step
// from what is left, which is read anew before half of it is claimed. What was claimed and may not
// be in that figure yet is taken off; where that leaves too little for a step, it waits for the
// others to be done, so that the last bytes are neither taken twice nor refused for nothing.
//
// Stateless; any thread may call it.
#pragma once

#include <cstddef>
#include <functional>

#include "tiers/system_memory.hpp"

namespace spillover {

inline constexpr size_t kHugePageBytes = size_t{2} << 20;

enum class PageSize { kSmall, kHugeWhereItCan };

struct PopulateOptions {
  PageSize page_size = PageSize::kSmall;
  // What the machine has left at the moment, of which floor_bytes stay; called on any thread. Where
  // there is none, nothing is watched.
  std::function<HostMemoryLimit()> available;
  size_t floor_bytes = 0;
  // Called on the calling thread at the start and from time to time with the bytes that are done;
  // what it throws ends the work early.
  std::function<void(size_t)> progress;
};

// Blocks; works on several threads, since one cannot zero as fast as memory takes it. Throws
// HostOutOfMemoryError where the system has no more pages, and before what is left is below the
// floor; then some pages of the range exist. Returns the bytes that are on huge pages by Note [Huge
// pages of shared memory], for which the address must be a multiple of such a page: 0 unless they
// are wanted.
size_t populate(std::byte* address, size_t size_bytes, const PopulateOptions& options);

}  // namespace spillover
