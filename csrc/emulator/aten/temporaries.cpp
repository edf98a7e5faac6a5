#include "emulator/aten/temporaries.hpp"

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <vector>

#include "emulator/aten/workspace.hpp"

namespace spillover::emulator {
namespace {

int64_t rounded_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

size_t bytes_of(int64_t elements, size_t element_bytes) {
  return static_cast<size_t>(elements) * element_bytes;
}

// ---- Convolutions ----

// Tensor cores read and write channels last. cuDNN transposes other tensors there and back, in its
// workspace.
bool uses_tensor_cores(const at::Tensor& input) {
  const auto type = input.scalar_type();
  return type == at::kHalf || type == at::kBFloat16 ||
         (type == at::kFloat && at::globalContext().allowTF32CuDNN());
}

// These have kernels of torch's own.
bool is_depthwise(const at::Tensor& input, const at::Tensor& weight, int64_t groups) {
  return groups > 1 && input.dim() >= 4 && input.size(1) == groups && weight.size(0) % groups == 0;
}

bool is_channels_last(const at::Tensor& tensor) {
  return tensor.suggest_memory_format() != at::MemoryFormat::Contiguous;
}

TemporaryGroup transposed(std::initializer_list<const at::Tensor*> tensors) {
  size_t total = 0;
  for (const at::Tensor* tensor : tensors) {
    if (tensor != nullptr && tensor->defined()) total += tensor->nbytes();
  }
  return {{total}, /*is_optional=*/true};
}

bool needs_transposition(const at::Tensor& input, const at::Tensor& weight,
                         const c10::IValue* groups) {
  return uses_tensor_cores(input) && !is_channels_last(input) && !is_channels_last(weight) &&
         !is_depthwise(input, weight, groups == nullptr ? 1 : groups->toInt());
}

Temporaries convolution_temporaries(const CostOperands& operands) {
  const at::Tensor& input = *operands.tensor("input");
  const at::Tensor& weight = *operands.tensor("weight");
  if (!needs_transposition(input, weight, operands.find("groups"))) return {};
  return {transposed({&input, &weight, &operands.results[0].toTensor()})};
}

Temporaries convolution_backward_temporaries(const CostOperands& operands) {
  const at::Tensor& grad_output = *operands.tensor("grad_output");
  const at::Tensor& input = *operands.tensor("input");
  const at::Tensor& weight = *operands.tensor("weight");
  if (!needs_transposition(input, weight, operands.find("groups"))) return {};
  Temporaries groups;
  const auto wants = [&](size_t index) {
    return operands.results[index].isTensor() && operands.results[index].toTensor().defined();
  };
  if (wants(0)) groups.push_back(transposed({&grad_output, &weight, &input}));
  if (wants(1)) groups.push_back(transposed({&grad_output, &input, &weight}));
  return groups;
}

// ---- Flash attention (flash_api.cpp) ----

int processor_count() {
  int device = 0;
  int count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// FlashAttention's num_splits_heuristic: as many parts of the keys as fill the processors well.
int64_t split_count(int64_t query_blocks, int64_t processors, int64_t key_blocks) {
  constexpr int64_t kSplitsMax = 128;
  if (static_cast<double>(query_blocks) >= 0.8 * static_cast<double>(processors)) return 1;
  const int64_t splits_max = std::min({kSplitsMax, processors, key_blocks});
  const auto blocks_each = [&](int64_t splits) { return (key_blocks + splits - 1) / splits; };
  std::vector<double> efficiency;
  double best = 0;
  for (int64_t splits = 1; splits <= splits_max; ++splits) {
    const bool is_eligible = splits == 1 || blocks_each(splits) != blocks_each(splits - 1);
    const double waves =
        static_cast<double>(query_blocks * splits) / static_cast<double>(processors);
    efficiency.push_back(is_eligible ? waves / std::ceil(waves) : 0);
    best = std::max(best, efficiency.back());
  }
  for (int64_t splits = 1; splits <= splits_max; ++splits) {
    const double here = efficiency[static_cast<size_t>(splits - 1)];
    if (here > 0 && here >= 0.85 * best) return splits;
  }
  return 1;
}

int64_t rounded_head(int64_t size) {
  return size <= 192 ? rounded_up(size, 32) : 256;
}

// (batch, heads, length, head size) tensors. Without dropout the keys may be split: each part has
// an output and a logsumexp of its own.
Temporaries flash_attention_temporaries(const CostOperands& operands) {
  const at::Tensor& query = *operands.tensor("query");
  const at::Tensor& key = *operands.tensor("key");
  if (operands.find("dropout_p")->toDouble() > 0) return {};
  const int64_t batch = query.size(0);
  const int64_t head = query.size(3);
  int64_t heads = query.size(1);
  int64_t length = query.size(2);
  if (length == 1 && heads > key.size(1) && head % 8 == 0) {
    // The heads that share a key count as its queries.
    length = heads / key.size(1);
    heads = key.size(1);
  }
  const int64_t key_block = head <= 64 ? 256 : head <= 128 ? 128 : 64;
  const int64_t splits =
      split_count(batch * heads * ((length + 63) / 64), 2 * int64_t{processor_count()},
                  (key.size(2) + key_block - 1) / key_block);
  if (splits == 1) return {};
  const int64_t rows = splits * batch * heads * length;
  return {{{bytes_of(rows, sizeof(float)), bytes_of(rows * rounded_head(head), sizeof(float))}}};
}

// The query's gradient is summed in single precision; shared keys and values get a gradient for
// each head first.
Temporaries flash_attention_backward_temporaries(const CostOperands& operands) {
  const at::Tensor& query = *operands.tensor("query");
  const at::Tensor& key = *operands.tensor("key");
  const int64_t rows = query.size(0) * query.size(1) * rounded_up(query.size(2), 128);
  TemporaryGroup group{
      {bytes_of(rows, sizeof(float)), bytes_of(rows * rounded_head(query.size(3)), sizeof(float))}};
  if (key.size(1) != query.size(1)) {
    const int64_t expanded = query.size(0) * query.size(1) * key.size(2) * query.size(3);
    group.sizes_bytes.append(2, bytes_of(expanded, key.element_size()));
  }
  return {group};
}

// ---- Gradients of embeddings (Embedding.cu, EmbeddingBackwardKernel.cu) ----

// Indices are sorted and their rows summed in segments of at most ten, in single precision for
// half-precision gradients. The sort's own scratch memory is not counted.
Temporaries embedding_backward_temporaries(const CostOperands& operands) {
  constexpr int64_t kUnsortedMax = 3072;
  constexpr int64_t kSegmentRows = 10;
  const at::Tensor& grad = *operands.tensor("grad_output");
  const at::Tensor& indices = *operands.tensor("indices");
  const int64_t count = indices.numel();
  if (count <= kUnsortedMax && !operands.find("scale_grad_by_freq")->toBool()) return {};
  const int64_t segments = std::min(count, operands.find("num_weights")->toInt());
  const int64_t parts = count / kSegmentRows + segments;
  const size_t index_bytes = indices.element_size();
  const size_t sum_bytes = std::max(static_cast<size_t>(grad.element_size()), sizeof(float));
  TemporaryGroup group{{bytes_of(count, index_bytes), bytes_of(count, index_bytes),
                        bytes_of(count, index_bytes), bytes_of(segments, index_bytes),
                        bytes_of(segments, index_bytes), bytes_of(parts, index_bytes),
                        bytes_of(parts * grad.size(-1), sum_bytes)}};
  return {group};
}

struct NamedRule {
  std::string_view name;
  Temporaries (*function)(const CostOperands&);
};

constexpr NamedRule kRules[] = {
    {"aten::convolution", &convolution_temporaries},
    {"aten::_convolution", &convolution_temporaries},
    {"aten::convolution_backward", &convolution_backward_temporaries},
    {"aten::_scaled_dot_product_flash_attention", &flash_attention_temporaries},
    {"aten::_scaled_dot_product_flash_attention_backward", &flash_attention_backward_temporaries},
    {"aten::embedding_dense_backward", &embedding_backward_temporaries},
};

bool temporaries_enabled() {
  const char* value = std::getenv("SPILLOVER_EMULATOR_KERNEL_WORKSPACES");
  return value == nullptr || std::strcmp(value, "0") != 0;
}

void allocate_group(const TemporaryGroup& group) {
  c10::SmallVector<at::DataPtr, 8> blocks;
  for (const size_t size_bytes : group.sizes_bytes) {
    if (size_bytes != 0) blocks.push_back(allocate_workspace(size_bytes, group.is_optional));
  }
}

}  // namespace

TemporaryRule::TemporaryRule(const OperatorPlan& plan) {
  static const bool enabled = temporaries_enabled();
  if (!enabled) return;
  for (const NamedRule& rule : kRules) {
    if (rule.name == plan.name) function_ = rule.function;
  }
}

void TemporaryRule::allocate_all(const Temporaries& groups) {
  for (const TemporaryGroup& group : groups) {
    try {
      allocate_group(group);
    } catch (const c10::OutOfMemoryError&) {
      if (!group.is_optional) throw;
    }
  }
}

}  // namespace spillover::emulator
