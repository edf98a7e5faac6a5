#include "optim/gradients.hpp"

#include <cmath>
#include <mutex>
#include <string>
#include <vector>

#include "base/error.hpp"
#include "optim/chunks.hpp"
#include "optim/dispatch.hpp"
#include "optim/kernel_table.hpp"
#include "optim/memory_spans.hpp"

namespace spillover {
namespace {

const char* at(const void* address, ElementType type, size_t index) {
  return static_cast<const char*>(address) + index * size_bytes_of(type);
}

// The arrays' memory is the caller's and not const where a call writes to it.
char* writable(const void* address, ElementType type, size_t index) {
  return const_cast<char*>(at(address, type, index));
}

void check(std::span<const ElementArray> arrays, bool is_written) {
  std::vector<MemorySpan> spans;
  std::vector<size_t> owners;
  for (size_t i = 0; i < arrays.size(); ++i) {
    const ElementArray& array = arrays[i];
    spans.push_back(
        {"array", array.address, array.count * size_bytes_of(array.type), true, is_written});
    owners.push_back(i);
    check_span(spans.back(), 1, i);
  }
  if (is_written) check_apart(spans, owners);
}

std::vector<size_t> counts_of(std::span<const ElementArray> arrays) {
  std::vector<size_t> counts;
  counts.reserve(arrays.size());
  for (const ElementArray& array : arrays) counts.push_back(array.count);
  return counts;
}

float checked_factor(const char* name, double value) {
  if (std::isfinite(value)) return static_cast<float>(value);
  throw ConfigError(std::string(name) + " is " + std::to_string(value) + "; it must be finite");
}

}  // namespace

SquareSum accumulate(std::span<const Accumulation> pieces, double scale, AccumulateMode mode,
                     int threads) {
  const float factor = checked_factor("scale", scale);
  std::vector<MemorySpan> spans;
  std::vector<size_t> owners;
  std::vector<size_t> counts;
  for (size_t i = 0; i < pieces.size(); ++i) {
    const auto both = memory_spans(pieces[i], mode);
    check_span(both[0], 1, i);
    check_span(both[1], alignof(float), i);
    spans.insert(spans.end(), both.begin(), both.end());
    owners.insert(owners.end(), both.size(), i);
    counts.push_back(pieces[i].gradient.count);
  }
  check_apart(spans, owners);
  const KernelTable& table = kernels();
  SquareSum total;
  std::mutex mutex;
  for_each_part(counts, threads, [&](size_t piece, size_t begin, size_t end) {
    const ElementArray& gradient = pieces[piece].gradient;
    SquareSum sum;
    table.accumulate(pieces[piece].accumulator + begin, at(gradient.address, gradient.type, begin),
                     gradient.type, factor, mode == AccumulateMode::kAdd, end - begin, sum);
    const std::lock_guard lock(mutex);
    total.add(sum);
  });
  return total;
}

SquareSum sum_of_squares(std::span<const ElementArray> arrays, int threads) {
  check(arrays, false);
  const KernelTable& table = kernels();
  SquareSum total;
  std::mutex mutex;
  for_each_part(counts_of(arrays), threads, [&](size_t i, size_t begin, size_t end) {
    SquareSum sum;
    table.sum_of_squares(at(arrays[i].address, arrays[i].type, begin), arrays[i].type, end - begin,
                         sum);
    const std::lock_guard lock(mutex);
    total.add(sum);
  });
  return total;
}

void scale_elements(std::span<const ElementArray> arrays, double factor, int threads) {
  const float by = checked_factor("factor", factor);
  check(arrays, true);
  const KernelTable& table = kernels();
  for_each_part(counts_of(arrays), threads, [&](size_t i, size_t begin, size_t end) {
    table.scale(writable(arrays[i].address, arrays[i].type, begin), arrays[i].type, by,
                end - begin);
  });
}

NonFinite find_non_finite(std::span<const ElementArray> arrays, int threads) {
  check(arrays, false);
  const KernelTable& table = kernels();
  NonFinite found;
  std::mutex mutex;
  for_each_part(counts_of(arrays), threads, [&](size_t i, size_t begin, size_t end) {
    size_t first = 0;
    const size_t count = table.count_non_finite(at(arrays[i].address, arrays[i].type, begin),
                                                arrays[i].type, end - begin, first);
    if (count == 0) return;
    first += begin;
    const std::lock_guard lock(mutex);
    const bool is_earlier =
        i < found.array || (i == found.array && first < found.index) || found.count == 0;
    if (is_earlier) {
      found.array = i;
      found.index = first;
    }
    found.count += count;
  });
  return found;
}

}  // namespace spillover
