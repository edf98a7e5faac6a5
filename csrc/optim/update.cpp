#include "optim/update.hpp"

#include <cmath>
#include <string>
#include <vector>

#include "base/error.hpp"
#include "optim/chunks.hpp"
#include "optim/dispatch.hpp"
#include "optim/kernel_table.hpp"
#include "optim/memory_spans.hpp"

namespace spillover {
namespace {

// ---- checks ----

[[noreturn]] void refuse(size_t range, const std::string& what) {
  throw ConfigError("range " + std::to_string(range) + " " + what);
}

// The value as an error says it; std::to_string has six digits after the point.
std::string text_of(double value) {
  std::string text(32, '\0');
  text.resize(static_cast<size_t>(std::snprintf(text.data(), text.size(), "%g", value)));
  return text;
}

void check_option(const char* name, double value, double below) {
  if (value >= 0 && value < below) return;
  throw ConfigError(
      std::string(name) + "=" + text_of(value) + " is out of range; it must be " +
      (std::isinf(below) ? "finite and not negative" : "at least 0 and below " + text_of(below)));
}

struct Needs {
  bool first = false;
  bool second = false;
  bool second_max = false;
};

void check_moment(size_t range, const char* name, const Moment& moment, bool is_needed) {
  const bool is_there = moment.format != MomentFormat::kNone;
  if (is_there == is_needed) return;
  refuse(range, is_needed ? std::string("has no ") + name + ", which the step updates"
                          : std::string("has ") + name + ", which the step does not use");
}

size_t alignment_of(const UpdateRange& range, const MemorySpan& span) {
  if (span.address == range.gradient) return 1;
  if (span.address == range.low_weight) return size_bytes_of(range.low_weight_type);
  for (const Moment* moment : {&range.first, &range.second, &range.second_max}) {
    if (span.address != moment->values) continue;
    if (moment->format == MomentFormat::kBFloat16) return 2;
    if (moment->format == MomentFormat::kBlockwise8) return 1;
  }
  return span.address == range.remainder ? alignof(int16_t) : alignof(float);
}

void check_range(size_t number, const UpdateRange& range, const Needs& needs) {
  if (range.step < 1) {
    refuse(number, "has step " + std::to_string(range.step) + "; the first one is 1");
  }
  if (range.remainder != nullptr && range.weight != nullptr) {
    refuse(number, "has weight and remainder; a remainder stands for a weight in fp32");
  }
  if (range.remainder != nullptr && range.low_weight_type != ElementType::kBFloat16) {
    refuse(number, "has a remainder, so its low_weight must be bfloat16");
  }
  if (range.low_weight != nullptr && range.low_weight_type == ElementType::kFloat32) {
    refuse(number, "has a low_weight of float32; it must be bfloat16 or float16");
  }
  check_moment(number, "first", range.first, needs.first);
  check_moment(number, "second", range.second, needs.second);
  check_moment(number, "second_max", range.second_max, needs.second_max);
  for (const Moment* moment : {&range.first, &range.second, &range.second_max}) {
    if (moment->format == MomentFormat::kBlockwise8 && range.first_index % kBlockElements != 0) {
      refuse(number, "begins at element " + std::to_string(range.first_index) +
                         "; with 8-bit moments it must be a multiple of " +
                         std::to_string(kBlockElements));
    }
  }
}

void check_all(std::span<const UpdateRange> ranges, const Needs& needs, const CallOptions& call) {
  if (!std::isfinite(call.gradient_scale)) {
    throw ConfigError("gradient_scale=" + text_of(call.gradient_scale) +
                      " is not finite; leave the step out instead");
  }
  std::vector<MemorySpan> spans;
  std::vector<size_t> owners;
  for (size_t i = 0; i < ranges.size(); ++i) {
    check_range(i, ranges[i], needs);
    for (const MemorySpan& span : memory_spans(ranges[i])) {
      check_span(span, alignment_of(ranges[i], span), i);
      spans.push_back(span);
      owners.push_back(i);
    }
  }
  check_apart(spans, owners);
}

// ---- coefficients ----

Lerp lerp_with(double weight) {
  if (weight < 0.5) return {static_cast<float>(weight), false};
  return {static_cast<float>(weight - 1), true};
}

float with_direction(double gradient_scale, Direction direction) {
  const auto scale = static_cast<float>(gradient_scale);
  return direction == Direction::kMaximize ? -scale : scale;
}

Split split(double factor) {
  auto high = static_cast<float>(std::abs(factor));
  if (static_cast<double>(high) >= std::abs(factor)) high = std::nextafterf(high, 0.0F);
  const auto low = static_cast<float>(std::abs(factor) - static_cast<double>(high));
  return factor < 0 ? Split{-high, -low} : Split{high, low};
}

void set_decay(double decay, StepConstants& constants) {
  constants.decays = decay != 0;
  constants.keep = split(1 - decay);
}

uint32_t noise_of(int64_t step) {
  const auto bits = static_cast<uint64_t>(step);
  return static_cast<uint32_t>(bits) * 0x85ebca6bU + static_cast<uint32_t>(bits >> 32);
}

void run(std::span<const UpdateRange> ranges, const std::vector<StepConstants>& constants,
         const CallOptions& call) {
  // Weights of less than this stay in the caches, where who sends them on finds them.
  constexpr size_t kStreamedMin = size_t{1} << 20;
  std::vector<size_t> counts;
  counts.reserve(ranges.size());
  size_t total = 0;
  for (const UpdateRange& range : ranges) {
    counts.push_back(range.count);
    total += range.count;
  }
  const Stores stores = total < kStreamedMin ? Stores::kCached : Stores::kStreaming;
  const KernelTable& table = kernels();
  for_each_part(counts, call.threads, [&](size_t range, size_t begin, size_t end) {
    table.update(ranges[range], constants[range], begin, end, stores);
  });
}

}  // namespace

void update_adam(std::span<const UpdateRange> ranges, const AdamOptions& options,
                 const CallOptions& call) {
  check_option("lr", options.lr, INFINITY);
  check_option("beta1", options.beta1, 1);
  check_option("beta2", options.beta2, 1);
  check_option("eps", options.eps, INFINITY);
  check_option("weight_decay", options.weight_decay, INFINITY);
  check_all(ranges, {.first = true, .second = true, .second_max = options.amsgrad}, call);
  const bool is_decoupled = options.decay == WeightDecay::kDecoupled;
  StepConstants common;
  common.algorithm = Algorithm::kAdam;
  common.gradient_scale = with_direction(call.gradient_scale, options.direction);
  common.l2 = static_cast<float>(is_decoupled ? 0 : options.weight_decay);
  set_decay(is_decoupled ? options.lr * options.weight_decay : 0, common);
  common.eps = static_cast<float>(options.eps);
  common.first = lerp_with(1 - options.beta1);
  common.second_keep = split(options.beta2);
  common.second_weight = static_cast<float>(1 - options.beta2);
  common.amsgrad = options.amsgrad;
  std::vector<StepConstants> constants(ranges.size(), common);
  for (size_t i = 0; i < ranges.size(); ++i) {
    const auto step = static_cast<double>(ranges[i].step);
    StepConstants& own = constants[i];
    own.step_size = static_cast<float>(options.lr / (1 - std::pow(options.beta1, step)));
    own.denominator_scale = static_cast<float>(1 / std::sqrt(1 - std::pow(options.beta2, step)));
    own.noise_seed = noise_of(ranges[i].step);
  }
  run(ranges, constants, call);
}

void update_sgd(std::span<const UpdateRange> ranges, const SgdOptions& options,
                const CallOptions& call) {
  check_option("lr", options.lr, INFINITY);
  check_option("momentum", options.momentum, INFINITY);
  check_option("weight_decay", options.weight_decay, INFINITY);
  if (!std::isfinite(options.dampening)) {
    throw ConfigError("dampening=" + text_of(options.dampening) + " is not finite");
  }
  const bool has_momentum = options.momentum != 0;
  if (options.nesterov && (!has_momentum || options.dampening != 0)) {
    throw ConfigError("nesterov needs a momentum above 0 and a dampening of 0");
  }
  check_all(ranges, {.first = has_momentum}, call);
  StepConstants common;
  common.algorithm = Algorithm::kSgd;
  common.gradient_scale = with_direction(call.gradient_scale, options.direction);
  common.l2 = static_cast<float>(options.weight_decay);
  common.step_size = static_cast<float>(options.lr);
  common.momentum = static_cast<float>(options.momentum);
  common.undampened = static_cast<float>(1 - options.dampening);
  common.has_momentum = has_momentum;
  common.nesterov = options.nesterov;
  std::vector<StepConstants> constants(ranges.size(), common);
  for (size_t i = 0; i < ranges.size(); ++i) {
    constants[i].reads_momentum = ranges[i].step > 1;
    constants[i].noise_seed = noise_of(ranges[i].step);
  }
  run(ranges, constants, call);
}

void update_lion(std::span<const UpdateRange> ranges, const LionOptions& options,
                 const CallOptions& call) {
  check_option("lr", options.lr, INFINITY);
  check_option("beta1", options.beta1, 1);
  check_option("beta2", options.beta2, 1);
  check_option("weight_decay", options.weight_decay, INFINITY);
  check_all(ranges, {.first = true}, call);
  StepConstants common;
  common.algorithm = Algorithm::kLion;
  common.gradient_scale = with_direction(call.gradient_scale, options.direction);
  set_decay(options.lr * options.weight_decay, common);
  common.step_size = static_cast<float>(options.lr);
  common.first = lerp_with(1 - options.beta1);
  common.second_lerp = lerp_with(1 - options.beta2);
  std::vector<StepConstants> constants(ranges.size(), common);
  for (size_t i = 0; i < ranges.size(); ++i) constants[i].noise_seed = noise_of(ranges[i].step);
  run(ranges, constants, call);
}

void update_adagrad(std::span<const UpdateRange> ranges, const AdagradOptions& options,
                    const CallOptions& call) {
  check_option("lr", options.lr, INFINITY);
  check_option("lr_decay", options.lr_decay, INFINITY);
  check_option("weight_decay", options.weight_decay, INFINITY);
  check_option("eps", options.eps, INFINITY);
  check_all(ranges, {.second = true}, call);
  StepConstants common;
  common.algorithm = Algorithm::kAdagrad;
  common.gradient_scale = with_direction(call.gradient_scale, options.direction);
  common.l2 = static_cast<float>(options.weight_decay);
  common.eps = static_cast<float>(options.eps);
  std::vector<StepConstants> constants(ranges.size(), common);
  for (size_t i = 0; i < ranges.size(); ++i) {
    const auto step = static_cast<double>(ranges[i].step);
    constants[i].step_size = static_cast<float>(options.lr / (1 + (step - 1) * options.lr_decay));
    constants[i].noise_seed = noise_of(ranges[i].step);
  }
  run(ranges, constants, call);
}

}  // namespace spillover
