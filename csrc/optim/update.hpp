// One optimizer step of fp32 weights on the CPU, in one pass over memory.
//
// Thread-safe where ranges of concurrent calls share no memory. The calls block, work on the shared
// threads (thread_pool.hpp) and throw ConfigError before anything was changed.
//
// Note [Same bits]
// The result of an element depends on its own inputs, on first_index and on the step's options,
// and nothing else: not on the instruction set, the number of threads or how a parameter is cut
// into ranges (8-bit moments: at multiples of kBlockElements). Every multiplication with an
// addition is a fused one, in all variants, where the text says fma, and two roundings elsewhere;
// denormals are kept. Sign and payload of a NaN are not promised.
//
// Note [Accuracy]
// The mathematics are torch's; coefficients are computed in double. A factor close to 1 (beta2, and
// 1 - lr * decay) is applied as a sum of two numbers, since its rounding to fp32 would act in every
// step: 1 - 1e-6 would be off by up to 3 % of the decay. Decay and step are rounded once, together:
// the rounding of the decay alone goes the same way step after step.
#pragma once

#include <span>

#include "optim/elements.hpp"

namespace spillover {

enum class WeightDecay { kDecoupled, kL2 };
enum class Direction { kMinimize, kMaximize };

struct CallOptions {
  double gradient_scale = 1.0;  // gradients count times this: unscaling and clipping in one
  int threads = 0;              // at most; 0: as set_optimizer_threads said
};

// Kingma and Ba, 2015; Loshchilov and Hutter, 2019, where decay is decoupled; Reddi et al., 2018,
// where ranges have second_max. Needs first and second.
struct AdamOptions {
  double lr = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 0;
  WeightDecay decay = WeightDecay::kDecoupled;
  bool amsgrad = false;
  Direction direction = Direction::kMinimize;
};
void update_adam(std::span<const UpdateRange> ranges, const AdamOptions& options,
                 const CallOptions& call);

// Needs first where momentum is not 0; at step 1 it is written without being read, as torch's.
struct SgdOptions {
  double lr = 1e-3;
  double momentum = 0;
  double dampening = 0;
  double weight_decay = 0;
  bool nesterov = false;
  Direction direction = Direction::kMinimize;
};
void update_sgd(std::span<const UpdateRange> ranges, const SgdOptions& options,
                const CallOptions& call);

// Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, algorithm 2. Needs first.
struct LionOptions {
  double lr = 1e-4;
  double beta1 = 0.9;
  double beta2 = 0.99;
  double weight_decay = 0;
  Direction direction = Direction::kMinimize;
};
void update_lion(std::span<const UpdateRange> ranges, const LionOptions& options,
                 const CallOptions& call);

// Duchi et al., 2011. Needs second, which starts as the initial value of the accumulator.
struct AdagradOptions {
  double lr = 1e-2;
  double lr_decay = 0;
  double weight_decay = 0;
  double eps = 1e-10;
  Direction direction = Direction::kMinimize;
};
void update_adagrad(std::span<const UpdateRange> ranges, const AdagradOptions& options,
                    const CallOptions& call);

}  // namespace spillover
