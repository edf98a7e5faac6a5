#include "emulator/aten/routing.hpp"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "emulator/core/dry_api.h"

namespace spillover::emulator {
namespace {

// More entries are a vocabulary's.
constexpr int64_t kExpertsMax = 1024;

struct TopkArguments {
  const at::Tensor& scores;
  int64_t chosen;
  int64_t dim;
  bool largest;
};

bool is_router(const TopkArguments& call) {
  const int64_t dims = call.scores.dim();
  if (dims < 2 || !call.scores.is_floating_point() || !call.largest) return false;
  if (call.dim != -1 && call.dim != dims - 1) return false;
  const int64_t experts = call.scores.size(-1);
  return experts >= 2 && experts <= kExpertsMax && call.chosen >= 1 && call.chosen <= experts;
}

}  // namespace

std::optional<at::Tensor> routed_experts(const OperatorPlan& plan,
                                         c10::ArrayRef<c10::IValue> arguments) {
  static const double imbalance = spillover_emulator_routing();
  if (imbalance <= 0 || plan.name != "aten::topk") return std::nullopt;
  const TopkArguments call{arguments[0].toTensor(), arguments[1].toInt(), arguments[2].toInt(),
                           arguments[3].toBool()};
  if (!is_router(call)) return std::nullopt;
  const int64_t experts = call.scores.size(-1);
  std::vector<int64_t> shape = call.scores.sizes().vec();
  shape.back() = call.chosen;
  return assign_experts(call.scores.numel() / experts, call.chosen, experts, imbalance).view(shape);
}

at::Tensor assign_experts(int64_t tokens, int64_t chosen, int64_t experts, double imbalance) {
  at::Tensor result = at::empty({tokens, chosen}, at::kLong);
  auto* next = result.mutable_data_ptr<int64_t>();
  const double mean = static_cast<double>(tokens * chosen) / static_cast<double>(experts);
  const auto busiest = std::min(tokens, static_cast<int64_t>(std::llround(imbalance * mean)));
  // One expert is drawn by quota, the others in turn. Tokens that choose all experts leave no
  // choice, and a balanced model needs no quota.
  const bool by_quota = imbalance > 1 && chosen < experts;
  const int64_t others = by_quota ? experts - 1 : experts;
  int64_t turn = 0;
  for (int64_t token = 0; token < tokens; ++token) {
    int64_t slot = 0;
    if (by_quota && (token + 1) * busiest / tokens > token * busiest / tokens) {
      *next++ = 0;
      ++slot;
    }
    for (; slot < chosen; ++slot) *next++ = turn++ % others + (by_quota ? 1 : 0);
  }
  return result;
}

}  // namespace spillover::emulator
