// Cuts a list of arrays into chunks for the threads. PRIVATE to optim/.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "optim/elements.hpp"
#include "optim/floating_point.hpp"
#include "optim/thread_pool.hpp"

namespace spillover {

// Runs part(array, begin, end) for parts of arrays with these counts of elements, each part
// beginning at a multiple of kBlockElements; on several threads where there is enough to do. part
// must not throw.
template <class Part>
void for_each_part(const std::vector<size_t>& counts, int threads, Part part) {
  // Waking a thread costs as much as a few ten thousand elements.
  constexpr size_t kAloneMax = 32768;
  constexpr size_t kChunkMax = 32768;
  constexpr size_t kChunkMin = 4096;
  static_assert(kChunkMin % kBlockElements == 0);
  size_t total = 0;
  for (const size_t count : counts) total += count;
  if (total <= kAloneMax) {
    const StandardArithmetic standard;
    for (size_t i = 0; i < counts.size(); ++i)
      if (counts[i] != 0) part(i, size_t{0}, counts[i]);
    return;
  }
  if (threads <= 0) threads = optimizer_threads();
  const size_t wanted = total / (static_cast<size_t>(threads) * 8);
  const size_t chunk_elements =
      std::clamp(wanted, kChunkMin, kChunkMax) / kBlockElements * kBlockElements;
  // Chunks of small arrays are neighbours in number, so a thread meets them one after the other.
  struct Context {
    const std::vector<size_t>& counts;
    std::vector<size_t> chunks_before;
    size_t chunk_elements;
    Part& part;
  } context{counts, {}, chunk_elements, part};
  context.chunks_before.reserve(counts.size());
  size_t chunk_count = 0;
  for (const size_t count : counts) {
    context.chunks_before.push_back(chunk_count);
    chunk_count += (count + chunk_elements - 1) / chunk_elements;
  }
  run_chunks(chunk_count, threads, &context, [](void* pointer, size_t chunk) {
    auto& all = *static_cast<Context*>(pointer);
    // The last array that begins at or before the chunk; empty ones before it have no chunks.
    const auto after = std::upper_bound(all.chunks_before.begin(), all.chunks_before.end(), chunk);
    const auto array = static_cast<size_t>(after - all.chunks_before.begin()) - 1;
    const size_t begin = (chunk - all.chunks_before[array]) * all.chunk_elements;
    const StandardArithmetic standard;
    all.part(array, begin, std::min(begin + all.chunk_elements, all.counts[array]));
  });
}

}  // namespace spillover
