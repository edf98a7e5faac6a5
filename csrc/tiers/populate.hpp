// Has the system give all pages of a range, zeroed, before somebody waits for them one by one.
//
// Stateless; any thread may call it.
#pragma once

#include <cstddef>
#include <functional>

namespace spillover {

// Blocks; works on several threads, since one cannot zero as fast as memory takes it. progress, if
// any, is called on the calling thread from time to time with the bytes that are done; what it
// throws ends the work early. Throws HostOutOfMemoryError where the system has no more pages.
void populate(std::byte* address, size_t size_bytes, const std::function<void(size_t)>& progress);

}  // namespace spillover
