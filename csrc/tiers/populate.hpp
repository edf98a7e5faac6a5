// Has the system give all pages of a range, zeroed, before somebody waits for them one by one.
//
// Note [Huge pages of shared memory]. The kernel makes huge pages of shared memory by itself only
// where an administrator allowed it (shmem_enabled), which is off on most machines; without them
// disks and links spend their time on page tables. MADV_COLLAPSE (Linux 6.1) asks for one range in
// spite of that setting: its first page is made, and the kernel puts a huge one in its place. Where
// it refuses a few times (no such call, no memory in one piece), pages are small.
//
// Stateless; any thread may call it.
#pragma once

#include <cstddef>
#include <functional>

namespace spillover {

// Blocks; works on several threads, since one cannot zero as fast as memory takes it. progress, if
// any, is called on the calling thread from time to time with the bytes that are done; what it
// throws ends the work early. Throws HostOutOfMemoryError where the system has no more pages.
// Returns the bytes that are on huge pages by Note [Huge pages of shared memory], for which the
// address must be a multiple of such a page: 0 unless they are wanted.
enum class PageSize { kSmall, kHugeWhereItCan };
size_t populate(std::byte* address, size_t size_bytes, PageSize page_size,
                const std::function<void(size_t)>& progress);

}  // namespace spillover
