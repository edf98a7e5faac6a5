#include "emulator/aten/plan.hpp"

#include <ATen/core/jit_type.h>

#include <algorithm>
#include <iterator>
#include <string_view>

namespace spillover::emulator {
namespace {

// Constant expressions, since plans are made while the library's other globals are initialised.

// Operators whose CUDA kernels ask for a cuBLAS handle. The base name decides: overloads share it.
constexpr std::string_view kCublasOperators[] = {
    "aten::_addmm_activation",
    "aten::_int_mm",
    "aten::_scaled_mm",
    "aten::addmm",
    "aten::addmv",
    "aten::addmv_",
    "aten::addmm_",
    "aten::baddbmm",
    "aten::baddbmm_",
    "aten::bmm",
    "aten::dot",
    "aten::linalg_solve_triangular",
    "aten::mm",
    "aten::mv",
    "aten::vdot",
    "aten::triangular_solve",
};

// Operators that return after the host has waited, because they must know how large their result is
// (or, for equal, what it is).
constexpr std::string_view kSynchronizingOperators[] = {
    "aten::_unique",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::linalg_lstsq",
    "aten::masked_select",
    "aten::nonzero",
    "aten::repeat_interleave",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "aten::unique_dim_consecutive",
};

constexpr std::string_view kMaskSynchronizingOperators[] = {
    "aten::index",         "aten::index_put",         "aten::index_put_", "aten::_index_put_impl_",
    "aten::_unsafe_index", "aten::_unsafe_index_put",
};

// Indices and lengths may live on the CPU.
constexpr std::string_view kMixedDeviceOperators[] = {
    "aten::_amp_foreach_non_finite_check_and_unscale_",
    "aten::_ctc_loss",
    "aten::_ctc_loss_backward",
    "aten::_index_put_impl_",
    "aten::_unsafe_index",
    "aten::_unsafe_index_put",
    "aten::index",
    "aten::index_put",
    "aten::index_put_",
    "aten::_scaled_dot_product_efficient_attention_backward",
    "aten::_efficient_attention_backward",
};

// Arguments that the kernel updates although the schema does not say so: the running statistics.
struct UndeclaredWrites {
  std::string_view name;
  int first;
  int second;
};

constexpr UndeclaredWrites kUndeclaredWrites[] = {
    {"aten::native_batch_norm", 3, 4},
    {"aten::batch_norm_update_stats", 1, 2},
    {"aten::batch_norm_gather_stats", 3, 4},
    {"aten::batch_norm_gather_stats_with_counts", 3, 4},
};

// Memory-efficient attention returns its seed and offset on the CPU (outside a graph capture).
constexpr std::string_view kOperatorsWithHostSeeds[] = {
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_efficient_attention_forward",
};
constexpr uint32_t kHostSeedReturns = 0b1100;

// Operators that write all of self and read none of it.
constexpr std::string_view kFillingOperators[] = {
    "aten::bernoulli_", "aten::cauchy_",    "aten::copy_",       "aten::exponential_",
    "aten::fill_",      "aten::geometric_", "aten::log_normal_", "aten::normal_",
    "aten::random_",    "aten::uniform_",   "aten::zero_",
};

template <size_t kCount>
bool contains(const std::string_view (&names)[kCount], std::string_view name) {
  return std::find(std::begin(names), std::end(names), name) != std::end(names);
}

ArgumentKind kind_of(const c10::TypePtr& declared) {
  c10::TypePtr type = declared;
  if (const auto optional = type->cast<c10::OptionalType>()) type = optional->getElementType();
  if (type->kind() == c10::TypeKind::TensorType) return ArgumentKind::kTensor;
  if (type->kind() == c10::TypeKind::GeneratorType) return ArgumentKind::kGenerator;
  if (type->kind() == c10::TypeKind::DeviceObjType) return ArgumentKind::kDevice;
  if (const auto list = type->cast<c10::ListType>()) {
    c10::TypePtr element = list->getElementType();
    if (const auto optional = element->cast<c10::OptionalType>()) {
      element = optional->getElementType();
    }
    if (element->kind() == c10::TypeKind::TensorType) return ArgumentKind::kTensorList;
  }
  return ArgumentKind::kOther;
}

// The argument that a return value annotated Tensor(a!) stands for.
int returned_argument(const c10::FunctionSchema& schema, const c10::Argument& result) {
  const c10::AliasInfo* info = result.alias_info();
  if (info == nullptr || !info->isWrite()) return -1;
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    const c10::AliasInfo* argument = schema.arguments()[i].alias_info();
    if (argument != nullptr && argument->isWrite() &&
        argument->beforeSets() == info->beforeSets()) {
      return static_cast<int>(i);
    }
  }
  return -1;
}

bool keeps_shapes(const c10::FunctionSchema& schema, const std::vector<int>& returned_arguments) {
  const std::string_view base = schema.name();
  const bool is_known_to = contains(kFillingOperators, base) ||
                           base.starts_with("aten::_foreach_") ||
                           base.starts_with("aten::_fused_") || base.starts_with("aten::_amp_");
  const auto is_out = [](const c10::Argument& argument) { return argument.is_out(); };
  return is_known_to && base.ends_with('_') &&
         std::none_of(schema.arguments().begin(), schema.arguments().end(), is_out) &&
         std::none_of(returned_arguments.begin(), returned_arguments.end(),
                      [](int index) { return index < 0; });
}

}  // namespace

OperatorPlan::OperatorPlan(const c10::FunctionSchema& schema)
    : name(c10::toString(schema.operator_name())) {
  const std::string_view base = schema.name();
  for (const c10::Argument& argument : schema.arguments()) {
    const int index = static_cast<int>(arguments.size());
    const ArgumentKind kind = kind_of(argument.type());
    const c10::AliasInfo* info = argument.alias_info();
    const bool is_written = info != nullptr && info->isWrite();
    const bool is_overwritten =
        is_written && (argument.is_out() || (index == 0 && contains(kFillingOperators, base)));
    arguments.push_back({kind, is_written, is_overwritten, argument.name()});
    if (kind == ArgumentKind::kGenerator) generator_index = index;
    if (kind == ArgumentKind::kDevice) device_index = index;
    has_tensor_arguments |= kind == ArgumentKind::kTensor || kind == ArgumentKind::kTensorList;
  }
  for (const c10::Argument& result : schema.returns()) {
    returned_arguments.push_back(returned_argument(schema, result));
  }
  writes_in_place = keeps_shapes(schema, returned_arguments);
  for (const UndeclaredWrites& writes : kUndeclaredWrites) {
    if (writes.name != base) continue;
    arguments.at(static_cast<size_t>(writes.first)).is_written = true;
    arguments.at(static_cast<size_t>(writes.second)).is_written = true;
  }
  if (contains(kOperatorsWithHostSeeds, base)) host_returns = kHostSeedReturns;
  takes_spread_lists = base.starts_with("aten::_foreach_");
  uses_cublas = contains(kCublasOperators, base);
  synchronizes_host = contains(kSynchronizingOperators, base);
  synchronizes_for_masks = contains(kMaskSynchronizingOperators, base);
  allows_host_tensors = contains(kMixedDeviceOperators, base);
}

}  // namespace spillover::emulator
