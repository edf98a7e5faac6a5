#include "emulator/aten/accesses.hpp"

#include <c10/cuda/CUDAException.h>
#include <c10/util/Exception.h>

#include <algorithm>

namespace spillover::emulator {
namespace {

constexpr int64_t kRunsMax = 4096;

struct Dimension {
  int64_t size;
  int64_t stride;
};

using Dimensions = c10::SmallVector<Dimension, 8>;

// The dimensions that move through memory, smallest stride first.
Dimensions moving_dimensions(const at::Tensor& tensor) {
  Dimensions dimensions;
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) > 1 && tensor.stride(i) != 0) {
      dimensions.push_back({tensor.size(i), tensor.stride(i)});
    }
  }
  std::sort(dimensions.begin(), dimensions.end(),
            [](const Dimension& a, const Dimension& b) { return a.stride < b.stride; });
  return dimensions;
}

// Removes the innermost dimensions that lie without gaps, and returns how many elements they cover.
int64_t take_contiguous_run(Dimensions& dimensions) {
  int64_t run = 1;
  size_t taken = 0;
  while (taken < dimensions.size() && dimensions[taken].stride <= run) {
    run += (dimensions[taken].size - 1) * dimensions[taken].stride;
    ++taken;
  }
  dimensions.erase(dimensions.begin(), dimensions.begin() + static_cast<ptrdiff_t>(taken));
  return run;
}

void append_runs(const char* base, int64_t run_bytes, int64_t element_bytes, bool is_written,
                 const Dimensions& dimensions, int64_t runs, RangeList& ranges) {
  c10::SmallVector<int64_t, 8> position(dimensions.size(), 0);
  const char* pointer = base;
  for (int64_t i = 0; i < runs; ++i) {
    ranges.push_back({pointer, static_cast<size_t>(run_bytes), is_written ? 1 : 0});
    for (size_t d = 0; d < dimensions.size(); ++d) {
      const int64_t stride_bytes = dimensions[d].stride * element_bytes;
      pointer += stride_bytes;
      if (++position[d] < dimensions[d].size) break;
      pointer -= stride_bytes * dimensions[d].size;
      position[d] = 0;
    }
  }
}

}  // namespace

size_t extent_bytes(const at::Tensor& tensor) {
  if (!tensor.defined() || tensor.numel() == 0) return 0;
  int64_t extent = 1;
  for (int64_t i = 0; i < tensor.dim(); ++i) extent += (tensor.size(i) - 1) * tensor.stride(i);
  return static_cast<size_t>(extent) * tensor.element_size();
}

bool hazards_enabled() {
  static const bool enabled = spillover_emulator_hazards_enabled() != 0;
  return enabled;
}

void append_ranges(const at::Tensor& tensor, bool is_written, RangeList& ranges) {
  if (tensor.numel() == 0) return;
  const auto* storage = static_cast<const char*>(tensor.storage().data());
  if (storage == nullptr) return;
  const auto element_bytes = static_cast<int64_t>(tensor.element_size());
  const char* base = storage + tensor.storage_offset() * element_bytes;
  if (tensor.is_contiguous()) {
    ranges.push_back({base, tensor.nbytes(), is_written ? 1 : 0});
    return;
  }
  Dimensions dimensions = moving_dimensions(tensor);
  const int64_t run = take_contiguous_run(dimensions);
  int64_t runs = 1;
  int64_t hull = run;
  for (const Dimension& dimension : dimensions) {
    runs = runs > kRunsMax ? runs : runs * dimension.size;
    hull += (dimension.size - 1) * dimension.stride;
  }
  if (runs > kRunsMax) {
    ranges.push_back({base, static_cast<size_t>(hull * element_bytes), is_written ? 1 : 0});
    return;
  }
  append_runs(base, run * element_bytes, element_bytes, is_written, dimensions, runs, ranges);
}

void begin_operator(cudaStream_t stream, const char* name, const RangeList& ranges) {
  const int status = spillover_emulator_operator_begin(stream, name, ranges.data(), ranges.size());
  if (C10_LIKELY(status == 0)) return;
  TORCH_CHECK(status != SPILLOVER_EMULATOR_HAZARD,
              "spillover emulator: ", spillover_emulator_last_hazard());
  // The error of a launch that failed, as torch reports it on a GPU.
  C10_CUDA_CHECK(static_cast<cudaError_t>(status));
}

void report_host_access(const char* name, const RangeList& ranges) {
  if (ranges.empty()) return;
  const int status = spillover_emulator_host_access(name, ranges.data(), ranges.size());
  TORCH_CHECK(status == 0, "spillover emulator: ", spillover_emulator_last_hazard());
}

}  // namespace spillover::emulator
