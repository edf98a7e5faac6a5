// Batches of sequences as attention's kernels for packed tensors see them: which rows belong to
// which sequence, and what a query may see. Pure functions; any thread may call them.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "emulator/aten/attention_math.hpp"

namespace spillover::emulator {

// One sequence: where its queries and keys lie in the packed tensors.
struct Sequence {
  int64_t query_start, query_length, key_start, key_length;
};

// From the cumulative lengths (one more than there are sequences).
std::vector<Sequence> sequences_of(const at::Tensor& query_offsets, const at::Tensor& key_offsets);

// (length, heads, size) rows of a packed tensor as (1, heads, length, size).
at::Tensor rows_of(const at::Tensor& packed, int64_t start, int64_t length);

// Which keys a query sees, counted from its own diagonal; nothing means no limit.
struct Window {
  std::optional<int64_t> left;
  std::optional<int64_t> right;
  // Where the diagonal ends: at the last key of the last query, or at the first of the first.
  bool from_bottom_right = true;
};

// Options with that window as causal flag or bias.
AttentionOptions options_for(const Window& window, int64_t query_length, int64_t key_length,
                             const at::Tensor& like);

// Sequences of one call draw different dropout masks.
PhiloxPosition position_of_sequence(PhiloxPosition position, size_t index);

}  // namespace spillover::emulator
