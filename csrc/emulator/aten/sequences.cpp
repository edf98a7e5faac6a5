#include "emulator/aten/sequences.hpp"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/zeros.h>

#include <limits>

namespace spillover::emulator {

using at::Tensor;

std::vector<Sequence> sequences_of(const Tensor& query_offsets, const Tensor& key_offsets) {
  const Tensor queries = query_offsets.to(at::kLong).contiguous();
  const Tensor keys = key_offsets.to(at::kLong).contiguous();
  const int64_t* q = queries.const_data_ptr<int64_t>();
  const int64_t* k = keys.const_data_ptr<int64_t>();
  std::vector<Sequence> sequences;
  for (int64_t i = 0; i + 1 < queries.numel(); ++i) {
    sequences.push_back({q[i], q[i + 1] - q[i], k[i], k[i + 1] - k[i]});
  }
  return sequences;
}

Tensor rows_of(const Tensor& packed, int64_t start, int64_t length) {
  return packed.narrow(0, start, length).unsqueeze(0).transpose(1, 2);
}

AttentionOptions options_for(const Window& window, int64_t query_length, int64_t key_length,
                             const Tensor& like) {
  AttentionOptions options;
  const int64_t shift = window.from_bottom_right ? key_length - query_length : 0;
  if (!window.left && !window.right) return options;
  if (!window.left && *window.right == 0 && shift == 0) {
    options.is_causal = true;
    return options;
  }
  // How far a key lies behind (negative) or ahead of its query's diagonal.
  const Tensor ahead =
      at::arange(key_length).unsqueeze(0) - at::arange(query_length).unsqueeze(1) - shift;
  Tensor bias = at::zeros({1, 1, query_length, key_length}, like.options());
  constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();
  if (window.left) bias.masked_fill_(ahead < -*window.left, kMinusInfinity);
  if (window.right) bias.masked_fill_(ahead > *window.right, kMinusInfinity);
  options.bias = bias;
  return options;
}

PhiloxPosition position_of_sequence(PhiloxPosition position, size_t index) {
  constexpr uint64_t kSequenceStep = 0xD1B54A32D192ED03ULL;
  return {position.seed + kSequenceStep * index, position.offset};
}

}  // namespace spillover::emulator
