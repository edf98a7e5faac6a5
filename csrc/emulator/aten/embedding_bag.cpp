// EmbeddingBag with CUDA's results beside the output: the bag of every index always, and the
// largest elements' rows for the mode "max" alone. The CPU's kernel leaves out what its own
// backward pass can do without.
#include <ATen/core/Tensor.h>
#include <ATen/ops/_embedding_bag.h>
#include <ATen/ops/_embedding_bag_forward_only.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/searchsorted.h>

#include <tuple>

#include "emulator/aten/own_kernels.hpp"

namespace spillover::emulator {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Bags = std::tuple<Tensor, Tensor, Tensor, Tensor>;

constexpr int64_t kModeMax = 2;

Bags with_device_results(Bags bags, const Tensor& indices, const Tensor& offsets, int64_t mode,
                         bool include_last_offset) {
  auto& [output, bag_of_index, bag_size, largest] = bags;
  if (bag_of_index.numel() != indices.numel()) {
    const int64_t count = offsets.size(0) - (include_last_offset ? 1 : 0);
    const Tensor places = at::arange(indices.numel(), offsets.options());
    bag_of_index = (at::searchsorted(offsets.narrow(0, 0, count), places, /*out_int32=*/false,
                                     /*right=*/true) -
                    1)
                       .to(indices.scalar_type());
  }
  if (mode != kModeMax) largest = at::empty({0}, indices.options());
  return bags;
}

Bags embedding_bag(const Tensor& weight, const Tensor& indices, const Tensor& offsets,
                   bool scale_grad_by_freq, int64_t mode, bool sparse,
                   const OptionalTensor& per_sample_weights, bool include_last_offset,
                   int64_t padding_idx) {
  return with_device_results(
      at::_embedding_bag(weight, indices, offsets, scale_grad_by_freq, mode, sparse,
                         per_sample_weights, include_last_offset, padding_idx),
      indices, offsets, mode, include_last_offset);
}

Bags embedding_bag_forward_only(const Tensor& weight, const Tensor& indices, const Tensor& offsets,
                                bool scale_grad_by_freq, int64_t mode, bool sparse,
                                const OptionalTensor& per_sample_weights, bool include_last_offset,
                                int64_t padding_idx) {
  return with_device_results(
      at::_embedding_bag_forward_only(weight, indices, offsets, scale_grad_by_freq, mode, sparse,
                                      per_sample_weights, include_last_offset, padding_idx),
      indices, offsets, mode, include_last_offset);
}

}  // namespace

void add_embedding_kernels(KernelTable& table) {
  add_kernel<&embedding_bag>(table, "aten::_embedding_bag");
  add_kernel<&embedding_bag_forward_only>(table, "aten::_embedding_bag_forward_only");
}

}  // namespace spillover::emulator
