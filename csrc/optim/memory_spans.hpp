// The arrays that a kernel reads and writes, by name: for checks of its arguments, for those who
// tell others of memory accesses, and for arithmetic about bandwidth. Values only.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "optim/elements.hpp"
#include "optim/gradients.hpp"

namespace spillover {

struct MemorySpan {
  const char* name;  // as Python's arguments are called
  const void* address;
  size_t size_bytes;
  bool is_read;
  bool is_written;
};

// Arrays that a range does not have are left out; one that is null though it must not be is in.
std::vector<MemorySpan> memory_spans(const UpdateRange& range);
std::vector<MemorySpan> memory_spans(const Accumulation& piece, AccumulateMode mode);

// Throws ConfigError, which names the arrays, where one that is written shares bytes with another
// one. spans[i] belongs to the argument of number owners[i].
void check_apart(std::span<const MemorySpan> spans, std::span<const size_t> owners);

// Throws ConfigError where the span is null, ends beyond the address space, or is not aligned.
void check_span(const MemorySpan& span, size_t alignment, size_t owner);

}  // namespace spillover
