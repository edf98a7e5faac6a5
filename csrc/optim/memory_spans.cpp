#include "optim/memory_spans.hpp"

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <string>

#include "base/error.hpp"

namespace spillover {
namespace {

uintptr_t begin_of(const MemorySpan& span) {
  return reinterpret_cast<uintptr_t>(span.address);
}
uintptr_t end_of(const MemorySpan& span) {
  return begin_of(span) + span.size_bytes;
}

std::string hexadecimal(uintptr_t value) {
  std::string text;
  for (; value != 0 || text.empty(); value >>= 4)
    text.insert(text.begin(), "0123456789abcdef"[value & 15]);
  return "0x" + text;
}

std::string described(const MemorySpan& span, size_t owner) {
  return std::string(span.name) + " of range " + std::to_string(owner) + " (" +
         std::to_string(span.size_bytes) + " bytes at " + hexadecimal(begin_of(span)) + ")";
}

void add_moment(std::vector<MemorySpan>& spans, const Moment& moment, const char* name,
                const char* scales_name, size_t count) {
  const auto add = [&](const char* what, const void* address, size_t size_bytes) {
    spans.push_back({what, address, size_bytes, true, true});
  };
  switch (moment.format) {
    case MomentFormat::kNone:
      return;
    case MomentFormat::kFloat32:
      return add(name, moment.values, count * 4);
    case MomentFormat::kBFloat16:
      return add(name, moment.values, count * 2);
    case MomentFormat::kBlockwise8:
      add(name, moment.values, count);
      return add(scales_name, moment.scales, block_count(count) * sizeof(float));
  }
}

}  // namespace

std::vector<MemorySpan> memory_spans(const UpdateRange& range) {
  std::vector<MemorySpan> spans;
  spans.reserve(9);
  const bool is_split = range.remainder != nullptr;
  spans.push_back(
      {"gradient", range.gradient, range.count * size_bytes_of(range.gradient_type), true, false});
  if (range.weight != nullptr || !is_split) {
    spans.push_back({"weight", range.weight, range.count * sizeof(float), true, true});
  }
  if (range.low_weight != nullptr || is_split) {
    spans.push_back({"low_weight", range.low_weight,
                     range.count * size_bytes_of(range.low_weight_type), is_split, true});
  }
  if (is_split) {
    spans.push_back({"remainder", range.remainder, range.count * sizeof(int16_t), true, true});
  }
  add_moment(spans, range.first, "first", "first_scales", range.count);
  add_moment(spans, range.second, "second", "second_scales", range.count);
  add_moment(spans, range.second_max, "second_max", "second_max_scales", range.count);
  return spans;
}

std::vector<MemorySpan> memory_spans(const Accumulation& piece, AccumulateMode mode) {
  const ElementArray& gradient = piece.gradient;
  return {
      {"gradient", gradient.address, gradient.count * size_bytes_of(gradient.type), true, false},
      {"accumulator", piece.accumulator, gradient.count * sizeof(float),
       mode == AccumulateMode::kAdd, true}};
}

void check_apart(std::span<const MemorySpan> spans, std::span<const size_t> owners) {
  std::vector<size_t> order(spans.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return begin_of(spans[a]) < begin_of(spans[b]); });
  // Of those that begin earlier, the ones that reach furthest, and that are written.
  const size_t* furthest = nullptr;
  const size_t* furthest_written = nullptr;
  const auto reaches = [&](const size_t* other, const MemorySpan& span) {
    return other != nullptr && end_of(spans[*other]) > begin_of(span);
  };
  for (const size_t& each : order) {
    const MemorySpan& span = spans[each];
    if (span.size_bytes == 0) continue;
    const size_t* other = reaches(furthest_written, span)              ? furthest_written
                          : span.is_written && reaches(furthest, span) ? furthest
                                                                       : nullptr;
    if (other != nullptr) {
      throw ConfigError(described(span, owners[each]) + " overlaps " +
                        described(spans[*other], owners[*other]) +
                        ", and at least one of them is written; give each its own memory");
    }
    const auto is_further = [&](const size_t* than) {
      return than == nullptr || end_of(span) > end_of(spans[*than]);
    };
    if (is_further(furthest)) furthest = &each;
    if (span.is_written && is_further(furthest_written)) furthest_written = &each;
  }
}

void check_span(const MemorySpan& span, size_t alignment, size_t owner) {
  if (span.size_bytes == 0) return;
  if (span.address == nullptr) {
    throw ConfigError(std::string(span.name) + " of range " + std::to_string(owner) +
                      " is null; give the address of its " + std::to_string(span.size_bytes) +
                      " bytes");
  }
  if (end_of(span) < begin_of(span)) {
    throw ConfigError(described(span, owner) + " ends beyond the address space");
  }
  if (begin_of(span) % alignment != 0) {
    throw ConfigError(described(span, owner) +
                      " is not aligned; its address must be a multiple of " +
                      std::to_string(alignment));
  }
}

}  // namespace spillover
