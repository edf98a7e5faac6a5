#include "emulator/aten/cost_math.hpp"

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "emulator/aten/card.hpp"

namespace spillover::emulator {
namespace {

struct Tile {
  double m;
  double n;
  double efficiency;
};

constexpr Tile kTiles[] = {{256, 128, 1},  {128, 256, 1},  {128, 128, 0.94},
                           {128, 64, 0.8}, {64, 128, 0.8}, {64, 64, 0.65}};
constexpr double kSplits[] = {1, 2, 4, 8, 16};
constexpr double kSplitMin = 256;

double ceil_div(double a, double b) {
  return std::ceil(a / b);
}

double extent_of(const at::Tensor& tensor, int64_t dimension) {
  return static_cast<double>(tensor.size(dimension));
}

double product_bytes(const ProductShape& shape, double element_bytes) {
  return shape.b * (shape.m * shape.k + shape.k * shape.n + shape.m * shape.n) * element_bytes;
}

// mm, addmm, bmm, baddbmm, ...: the last two dimensions multiply.
KernelCost multiplies(const at::Tensor* a, const at::Tensor* b) {
  if (a == nullptr || b == nullptr || a->dim() < 2 || b->dim() < 1) return bytes_bound_cost(0);
  ProductShape shape;
  shape.m = extent_of(*a, -2);
  shape.k = extent_of(*a, -1);
  shape.n = b->dim() < 2 ? 1 : extent_of(*b, -1);
  if (a->dim() == 3) shape.b = extent_of(*a, 0);
  const double bytes = product_bytes(shape, static_cast<double>(a->element_size()));
  const Card& card = Card::instance();
  return product_cost(shape, bytes, card.peak(a->scalar_type()), card.matmul_efficiency);
}

KernelCost product_of(const CostOperands& operands, std::string_view first,
                      std::string_view second) {
  return multiplies(operands.tensor(first), operands.tensor(second));
}

KernelCost mm(const CostOperands& operands) {
  return product_of(operands, "self", "mat2");
}
KernelCost addmm(const CostOperands& operands) {
  return product_of(operands, "mat1", "mat2");
}
KernelCost baddbmm(const CostOperands& operands) {
  return product_of(operands, "batch1", "batch2");
}
KernelCost mv(const CostOperands& operands) {
  return product_of(operands, operands.tensor("mat") != nullptr ? "mat" : "self", "vec");
}

double product_of(const std::vector<int64_t>& values) {
  double total = 1;
  for (const int64_t value : values) total *= static_cast<double>(value);
  return total;
}

double spatial(const at::Tensor& tensor) {
  double total = 1;
  for (int64_t i = 2; i < tensor.dim(); ++i) total *= extent_of(tensor, i);
  return total;
}

// The shapes of a convolution as of the forward pass: x is large, y is what it makes.
struct Convolution {
  const at::Tensor* x;
  const at::Tensor* w;
  const at::Tensor* y;
  double groups;
  double stride;

  double bytes() const { return tensor_bytes(*x) + tensor_bytes(*w) + tensor_bytes(*y); }
  double filter() const { return spatial(*w); }
  double channels() const { return extent_of(*x, 1) / groups; }
  double outputs() const { return extent_of(*y, 1) / groups; }

  ProductShape forward() const {
    return {groups, extent_of(*x, 0) * spatial(*y), outputs(), channels() * filter()};
  }
  ProductShape input_gradient() const {
    return {groups, extent_of(*x, 0) * spatial(*x), channels(),
            ceil_div(outputs() * filter(), stride)};
  }
  ProductShape weight_gradient() const {
    return {groups, outputs(), channels() * filter(), extent_of(*x, 0) * spatial(*y)};
  }
  KernelCost cost(const ProductShape& shape) const {
    if (channels() == 1 && groups > 1) return bytes_bound_cost(bytes());
    const Card& card = Card::instance();
    return product_cost(shape, bytes(), card.peak(x->scalar_type()), card.convolution_efficiency);
  }
};

// A transposed convolution is the gradient of one whose input and output are exchanged.
bool is_transposed(const CostOperands& operands) {
  const c10::IValue* const value = operands.find("transposed");
  return value != nullptr && value->isBool() && value->toBool();
}

Convolution convolution_of(const CostOperands& operands, const at::Tensor* x, const at::Tensor* y) {
  const c10::IValue* const groups = operands.find("groups");
  const c10::IValue* const stride = operands.find("stride");
  Convolution found{x, operands.tensor("weight"), y, 1, 1};
  if (is_transposed(operands)) std::swap(found.x, found.y);
  if (groups != nullptr && groups->isInt()) found.groups = static_cast<double>(groups->toInt());
  if (stride != nullptr && stride->isIntList()) found.stride = product_of(stride->toIntVector());
  return found;
}

KernelCost convolution(const CostOperands& operands) {
  const at::Tensor* const x = operands.tensor("input");
  if (x == nullptr || operands.tensor("weight") == nullptr || operands.results.empty() ||
      !operands.results[0].isTensor() || x->dim() < 3) {
    return bytes_bound_cost(0);
  }
  const Convolution found = convolution_of(operands, x, &operands.results[0].toTensor());
  return found.cost(is_transposed(operands) ? found.input_gradient() : found.forward());
}

KernelCost convolution_backward(const CostOperands& operands) {
  const at::Tensor* const x = operands.tensor("input");
  const at::Tensor* const y = operands.tensor("grad_output");
  if (x == nullptr || y == nullptr || operands.tensor("weight") == nullptr || x->dim() < 3) {
    return bytes_bound_cost(0);
  }
  const Convolution found = convolution_of(operands, x, y);
  const c10::IValue* const mask = operands.find("output_mask");
  const auto wanted = [&](size_t index) {
    return mask == nullptr || !mask->isBoolList() || mask->toBoolList().size() <= index ||
           mask->toBoolList().get(index);
  };
  KernelCost total;
  uint64_t longest_ns = 0;
  const auto add = [&](const KernelCost& part) {
    if (part.duration_ns > longest_ns) {
      longest_ns = part.duration_ns;
      total.limit = part.limit;
    }
    total.duration_ns += part.duration_ns;
    total.moved_bytes += part.moved_bytes;
    total.device_bytes += part.device_bytes;
  };
  if (wanted(0)) {
    add(found.cost(is_transposed(operands) ? found.forward() : found.input_gradient()));
  }
  if (wanted(1)) add(found.cost(found.weight_gradient()));
  if (wanted(2)) add(bytes_bound_cost(tensor_bytes(*y)));
  return total;
}

struct AttentionShape {
  double b = 1;
  double h = 0;
  double s_q = 0;
  double s_k = 0;
  double d = 0;
};

KernelCost attention_cost(const AttentionShape& shape, bool is_causal, bool is_backward,
                          double bytes, c10::ScalarType type) {
  constexpr double kBlock = 128;
  const Card& card = Card::instance();
  const double keys =
      is_causal ? std::max(shape.s_k - shape.s_q + shape.s_q / 2 + 64, 0.0) : shape.s_k;
  const double blocks = shape.b * shape.h * ceil_div(shape.s_q, kBlock);
  const double waves =
      blocks >= 2 * card.sm_count ? blocks / card.sm_count : ceil_div(blocks, card.sm_count);
  const double efficiency =
      (is_backward ? card.attention_backward_efficiency : card.attention_forward_efficiency) *
      shape.d / (shape.d + card.attention_head_ramp);
  const double flop = (is_backward ? 10 : 4) * kBlock * shape.d * (keys + card.attention_key_ramp);
  const double math = waves * card.sm_count * flop / (card.peak(type) * efficiency);
  return kernel_cost(std::max(math, bytes / card.rate(bytes)), bytes);
}

bool is_causal(const CostOperands& operands) {
  const c10::IValue* const flag = operands.find("is_causal");
  if (flag != nullptr && flag->isBool()) return flag->toBool();
  const c10::IValue* const type = operands.find("custom_mask_type");
  return type != nullptr && type->isInt() && type->toInt() != 0;
}

// _scaled_dot_product_*: b x h x s x d.
template <bool kIsBackward>
KernelCost attention_cost(const CostOperands& operands) {
  const at::Tensor* const q = operands.tensor("query");
  const at::Tensor* const k = operands.tensor("key");
  if (q == nullptr || k == nullptr || q->dim() != 4) return bytes_bound_cost(0);
  const AttentionShape shape{extent_of(*q, 0), extent_of(*q, 1), extent_of(*q, 2), extent_of(*k, 2),
                             extent_of(*q, 3)};
  const double bytes = (kIsBackward ? 2 : 1) * (2 * tensor_bytes(*q) + 2 * tensor_bytes(*k));
  return attention_cost(shape, is_causal(operands), kIsBackward, bytes, q->scalar_type());
}

// _flash_attention_*, _efficient_attention_*: b x s x h x d, or sequences packed one after the
// other, of which the longest is given.
template <bool kIsBackward>
KernelCost packed_attention(const CostOperands& operands) {
  const at::Tensor* const q = operands.tensor("query");
  const at::Tensor* const k = operands.tensor("key");
  if (q == nullptr || k == nullptr || q->dim() < 3) return bytes_bound_cost(0);
  AttentionShape shape;
  shape.h = extent_of(*q, -2);
  shape.d = extent_of(*q, -1);
  shape.s_q = extent_of(*q, -3);
  shape.s_k = extent_of(*k, -3);
  if (q->dim() == 4) shape.b = extent_of(*q, 0);
  for (const char* name : {"cum_seq_q", "cu_seqlens_q"}) {
    const at::Tensor* const starts = operands.tensor(name);
    if (starts == nullptr || starts->numel() < 2) continue;
    shape.b = static_cast<double>(starts->numel() - 1);
    shape.s_q = std::ceil(shape.s_q / shape.b);
    shape.s_k = std::ceil(shape.s_k / shape.b);
  }
  const double bytes = (kIsBackward ? 2 : 1) * (2 * tensor_bytes(*q) + 2 * tensor_bytes(*k));
  return attention_cost(shape, is_causal(operands), kIsBackward, bytes, q->scalar_type());
}

}  // namespace

KernelCost product_cost(const ProductShape& shape, double bytes, double peak, double efficiency) {
  const Card& card = Card::instance();
  double best = std::numeric_limits<double>::infinity();
  double moved = bytes;
  for (const Tile& tile : kTiles) {
    for (const double split : kSplits) {
      if (split != 1 && shape.k / split < kSplitMin) break;
      const double blocks = shape.b * ceil_div(shape.m, tile.m) * ceil_div(shape.n, tile.n) * split;
      const double waves = ceil_div(blocks, card.sm_count);
      const double k_block = ceil_div(shape.k, split) + card.matmul_k_ramp;
      const double math = waves * card.sm_count * (2 * tile.m * tile.n * k_block) /
                          (peak * efficiency * tile.efficiency);
      const double total = bytes + (split == 1 ? 0 : 2 * split * shape.b * shape.m * shape.n * 4);
      const double duration = std::max(math, total / card.rate(total));
      if (duration >= best) continue;
      best = duration;
      moved = total;
    }
  }
  return kernel_cost(best, moved);
}

void add_math_rules(
    std::unordered_map<std::string_view, KernelCost (*)(const CostOperands&)>& rules) {
  for (const char* name : {"mm", "bmm", "_scaled_mm", "_int_mm"}) rules.emplace(name, mm);
  for (const char* name : {"addmm", "addmm_", "_addmm_activation"}) rules.emplace(name, addmm);
  for (const char* name : {"baddbmm", "baddbmm_"}) rules.emplace(name, baddbmm);
  for (const char* name : {"mv", "addmv", "addmv_"}) rules.emplace(name, mv);
  for (const char* name : {"convolution", "_convolution", "convolution_overrideable"}) {
    rules.emplace(name, convolution);
  }
  for (const char* name : {"convolution_backward", "convolution_backward_overrideable"}) {
    rules.emplace(name, convolution_backward);
  }
  rules.emplace("_scaled_dot_product_flash_attention", attention_cost<false>);
  rules.emplace("_scaled_dot_product_efficient_attention", attention_cost<false>);
  rules.emplace("_scaled_dot_product_flash_attention_backward", attention_cost<true>);
  rules.emplace("_scaled_dot_product_efficient_attention_backward", attention_cost<true>);
  rules.emplace("_flash_attention_forward", packed_attention<false>);
  rules.emplace("_efficient_attention_forward", packed_attention<false>);
  rules.emplace("_flash_attention_backward", packed_attention<true>);
  rules.emplace("_efficient_attention_backward", packed_attention<true>);
}

}  // namespace spillover::emulator
