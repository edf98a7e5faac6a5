// Runs every kernel with every instruction set of the processor and compares what they write with
// what the portable ones write, bit for bit but for the sign and payload of NaNs. Prints a digest
// of each kind of case, which is the same on every processor. Built and run by test_neon.py.
#include "neon_check.hpp"

#include <array>

#include "optim/conversions.hpp"
#include "optim/gradients.hpp"
#include "optim/kernel_table.hpp"
#include "optim/update.hpp"

namespace {

using namespace spillover;
using namespace checks;

// ---- steps ----

using Ranges = std::span<const UpdateRange>;

struct Optimizer {
  const char* name;
  std::array<bool, 3> moments;  // first, second, second_max
  void (*step)(Ranges, const CallOptions&);
};

constexpr std::array kNoMoment{false, false, false};
constexpr std::array kFirst{true, false, false};
constexpr std::array kSecond{false, true, false};
constexpr std::array kBoth{true, true, false};
constexpr std::array kAll{true, true, true};

constexpr Optimizer kOptimizers[] = {
    {"adamw", kBoth,
     [](Ranges ranges, const CallOptions& call) {
       update_adam(ranges, {.weight_decay = 0.01}, call);
     }},
    {"adamw amsgrad", kAll,
     [](Ranges ranges, const CallOptions& call) {
       update_adam(ranges,
                   {.weight_decay = 0.1, .amsgrad = true, .direction = Direction::kMaximize}, call);
     }},
    {"adam", kBoth,
     [](Ranges ranges, const CallOptions& call) {
       update_adam(ranges, {.weight_decay = 0.01, .decay = WeightDecay::kL2}, call);
     }},
    {"adam without mean or eps", kBoth,
     [](Ranges ranges, const CallOptions& call) {
       update_adam(ranges, {.beta1 = 0, .beta2 = 0.5, .eps = 0}, call);
     }},
    {"sgd", kNoMoment,
     [](Ranges ranges, const CallOptions& call) { update_sgd(ranges, {.lr = 0.1}, call); }},
    {"sgd momentum", kFirst,
     [](Ranges ranges, const CallOptions& call) {
       update_sgd(ranges, {.momentum = 0.9, .dampening = 0.1, .weight_decay = 0.1}, call);
     }},
    {"sgd nesterov", kFirst,
     [](Ranges ranges, const CallOptions& call) {
       update_sgd(ranges, {.momentum = 0.9, .nesterov = true, .direction = Direction::kMaximize},
                  call);
     }},
    {"lion", kFirst,
     [](Ranges ranges, const CallOptions& call) {
       update_lion(ranges, {.weight_decay = 0.1}, call);
     }},
    {"lion quick", kFirst,
     [](Ranges ranges, const CallOptions& call) {
       update_lion(ranges, {.beta1 = 0.2, .beta2 = 0.3, .direction = Direction::kMaximize}, call);
     }},
    {"adagrad", kSecond,
     [](Ranges ranges, const CallOptions& call) {
       update_adagrad(ranges, {.lr_decay = 0.1, .weight_decay = 0.1}, call);
     }},
};

struct MomentFormats {
  const char* name;
  MomentFormat of[3];
};

constexpr MomentFormats kMomentFormats[] = {
    {"fp32", {MomentFormat::kFloat32, MomentFormat::kFloat32, MomentFormat::kFloat32}},
    {"bf16", {MomentFormat::kBFloat16, MomentFormat::kBFloat16, MomentFormat::kBFloat16}},
    {"8 bits", {MomentFormat::kBlockwise8, MomentFormat::kBlockwise8, MomentFormat::kBlockwise8}},
    {"mixed", {MomentFormat::kBlockwise8, MomentFormat::kBFloat16, MomentFormat::kFloat32}},
};

enum class Weights { kFloat32, kLowBFloat16, kLowFloat16, kSplit };
constexpr Weights kWeights[] = {Weights::kFloat32, Weights::kLowBFloat16, Weights::kLowFloat16,
                                Weights::kSplit};
constexpr const char* kWeightNames[] = {"fp32", "fp32 and bf16", "fp32 and fp16", "split"};

// A parameter with everything that a step changes.
struct State {
  Array weight, low, remainder;
  Array moments[3], scales[3];
  UpdateRange range;  // without its addresses

  State(const Optimizer& optimizer, const MomentFormats& formats, Weights weights, size_t count,
        Content content, Random& random) {
    // Of some elements; gradients have an offset of any bytes.
    const auto offset = [&](Kind kind) { return random() % 17 * size_bytes_of(kind); };
    const auto make = [&](Kind kind, size_t size, Content with) {
      return drawn(kind, size, offset(kind), with, random);
    };
    range.count = count;
    const bool is_split = weights == Weights::kSplit;
    if (!is_split) weight = make(Kind::kFloat32, count, content);
    if (is_split) remainder = make(Kind::kRemainder, count, content);
    if (weights == Weights::kLowFloat16) range.low_weight_type = ElementType::kFloat16;
    if (weights != Weights::kFloat32) low = make(kind_of(range.low_weight_type), count, content);
    Moment* own[] = {&range.first, &range.second, &range.second_max};
    for (size_t i = 0; i < 3; ++i) {
      if (!optimizer.moments[i]) continue;
      own[i]->format = formats.of[i];
      if (formats.of[i] == MomentFormat::kBlockwise8) {
        moments[i] = make(Kind::kCode, count, content);
        scales[i] = make(Kind::kFloat32, block_count(count), content);
        scales[i].drop_signs();
      } else {
        const bool is_wide = formats.of[i] == MomentFormat::kFloat32;
        moments[i] = make(is_wide ? Kind::kFloat32 : Kind::kBFloat16, count, content);
        if (i != 0 && content != Content::kAnyBits) moments[i].drop_signs();
      }
    }
  }

  UpdateRange range_at(const Array& gradient, ElementType type, int64_t step) {
    UpdateRange result = range;
    result.step = step;
    result.gradient = gradient.data();
    result.gradient_type = type;
    if (weight.count() != 0) result.weight = weight.as<float>();
    if (low.count() != 0) result.low_weight = low.data();
    if (remainder.count() != 0) result.remainder = remainder.as<int16_t>();
    Moment* own[] = {&result.first, &result.second, &result.second_max};
    for (size_t i = 0; i < 3; ++i) {
      if (moments[i].count() != 0) own[i]->values = moments[i].data();
      if (scales[i].count() != 0) own[i]->scales = scales[i].as<float>();
    }
    return result;
  }

  void add_to(Results& results) const {
    results.add("weight", weight);
    results.add("low weight", low);
    results.add("remainder", remainder);
    constexpr const char* kNames[] = {"first", "second", "second_max"};
    for (size_t i = 0; i < 3; ++i) {
      if (moments[i].kind() == Kind::kCode) {
        results.add(kNames[i], moments[i], scales[i]);
      } else {
        results.add(kNames[i], moments[i]);
      }
    }
  }
};

// Lengths of vectors, blocks and tiles, and of what is left behind those.
std::array<size_t, 4> lengths(Random& random) {
  constexpr size_t kBorders[] = {256, 512, 768, 1024};
  const size_t border = kBorders[random() % std::size(kBorders)];
  return {1 + random() % 20, 4 * (1 + random() % 40), border - 5 + random() % 10,
          1 + random() % 1400};
}

void check_steps(const Optimizer& optimizer, const MomentFormats& formats, Weights weights,
                 ElementType type, Random& random) {
  constexpr double kScales[] = {1, 0.7, 0x1p-16, 1000};
  const std::string name = std::string(optimizer.name) + ", moments " + formats.name +
                           ", weights " + kWeightNames[static_cast<int>(weights)] + ", gradients " +
                           kTypeNames[static_cast<int>(type)];
  for (const Content content : kContents) {
    for (const size_t count : lengths(random)) {
      State state(optimizer, formats, weights, count, content, random);
      state.range.first_index = (uint64_t{random()} << 4) * kBlockElements;
      const int64_t first_step = random() % 2 == 0 ? 1 : 1 + random() % 100000;
      const CallOptions call{.gradient_scale = kScales[random() % 4], .threads = 1};
      std::vector<Array> gradients;
      for (int i = 0; i < 3; ++i)
        gradients.push_back(drawn(kind_of(type), count, random() % 67, content, random));
      const std::string label = name + ", " + std::to_string(count) + " elements, content " +
                                std::to_string(static_cast<int>(content));
      check(label, [&] {
        State own = state;
        Results results;
        for (size_t i = 0; i < gradients.size(); ++i) {
          const auto step = first_step + static_cast<int64_t>(i);
          const UpdateRange range = own.range_at(gradients[i], type, step);
          optimizer.step({&range, 1}, call);
        }
        own.add_to(results);
        return results;
      });
    }
  }
  print_digest(name);
}

void check_all_steps(Random& random) {
  for (const Optimizer& optimizer : kOptimizers) {
    const bool has_moments = optimizer.moments != kNoMoment;
    for (const MomentFormats& formats : std::span(kMomentFormats, has_moments ? 4 : 1))
      for (const Weights weights : kWeights)
        for (const ElementType type : kTypes)
          check_steps(optimizer, formats, weights, type, random);
  }
}

// ---- what steps do now and then ----

// What a kernel makes of weights in 16 bits while it takes step_size * gradient from them.
Results low_weights(const Array& weights, const Array& gradient, ElementType type,
                    size_t offset_bytes, float step_size, Stores stores) {
  Array own = weights;
  Array low(kind_of(type), own.count(), offset_bytes);
  UpdateRange range;
  range.count = own.count();
  range.gradient = gradient.data();
  range.weight = own.as<float>();
  range.low_weight = low.data();
  range.low_weight_type = type;
  StepConstants constants;
  constants.algorithm = Algorithm::kSgd;
  constants.step_size = step_size;
  kernels().update(range, constants, 0, own.count(), stores);
  Results results;
  results.add("low weight", low);
  return results;
}

// Every upper half of an fp32 value with lower halves beside the ties of both formats.
void check_rounding() {
  constexpr uint32_t kLower[] = {0,      1,      0x0fff, 0x1000, 0x1001, 0x2fff, 0x3000,
                                 0x3001, 0x7fff, 0x8000, 0x8001, 0xefff, 0xf000, 0xffff};
  Array weights(Kind::kFloat32, std::size(kLower) << 16, 0);
  for (size_t i = 0; i < weights.count(); ++i)
    weights.set(i, static_cast<uint32_t>(i) << 16 | kLower[i >> 16]);
  const std::vector<uint32_t> zeros(weights.count());
  const Array gradient = floats(zeros);
  for (const ElementType type : {ElementType::kBFloat16, ElementType::kFloat16}) {
    check(std::string("rounding to ") + kTypeNames[static_cast<int>(type)],
          [&] { return low_weights(weights, gradient, type, 0, 0, Stores::kCached); });
  }
  print_digest("rounding");
}

// Low weights that are put past the caches, to all places in a line.
void check_streaming(Random& random) {
  for (const ElementType type : {ElementType::kBFloat16, ElementType::kFloat16}) {
    for (size_t offset = 0; offset < 64; offset += 2) {
      for (const size_t count : lengths(random)) {
        const Array weights = drawn(Kind::kFloat32, count, 0, Content::kAnyBits, random);
        const Array gradient = drawn(Kind::kFloat32, count, 0, Content::kAnyBits, random);
        check("streaming to offset " + std::to_string(offset), [&] {
          return low_weights(weights, gradient, type, offset, 0.1F, Stores::kStreaming);
        });
      }
    }
  }
  print_digest("streaming");
}

// Denormals flushed to zero in this thread, as a program may set it for its own arithmetic.
class FlushedDenormals {
 public:
#if defined(__aarch64__)
  FlushedDenormals() { set(uint64_t{1} << 24); }
  ~FlushedDenormals() { set(0); }

 private:
  static void set(uint64_t state) { asm volatile("msr fpcr, %0" : : "r"(state)); }
#elif defined(__x86_64__)
  FlushedDenormals() { __builtin_ia32_ldmxcsr(0x9fc0); }
  ~FlushedDenormals() { __builtin_ia32_ldmxcsr(0x1f80); }
#endif
};

bool is_flushing() {
  volatile float denormal = 1e-40F;
  return denormal * 0.5F == 0;
}

// Long ranges, on several threads and where the caller flushes denormals.
void check_surroundings(Random& random) {
  constexpr size_t kCount = 70001;
  const Optimizer& optimizer = kOptimizers[0];
  const State state(optimizer, kMomentFormats[1], Weights::kLowFloat16, kCount, Content::kSpecial,
                    random);
  const Array gradient = drawn(Kind::kBFloat16, kCount, 1, Content::kSpecial, random);
  const auto step = [&](int threads) {
    State own = state;
    const UpdateRange range = own.range_at(gradient, ElementType::kBFloat16, 2);
    optimizer.step({&range, 1}, {.threads = threads});
    Results results;
    own.add_to(results);
    return results;
  };
  Results alone;
  check("one thread", [&] { return alone = step(1); });
  check("three threads", [&] {
    const Results found = step(3);
    compare("three threads", alone, found);
    return found;
  });
  check("denormals flushed", [&] {
    const FlushedDenormals flushed;
    const Results found = step(1);
    compare("denormals flushed", alone, found);
    if (!is_flushing()) fail("a step changes how its caller computes");
    return found;
  });
  print_digest("surroundings");
}

// ---- gradients ----

void check_gradients_of(ElementType type, const Array& gradient, const Array& before) {
  const ElementArray array{gradient.data(), type, gradient.count()};
  const std::string label =
      std::string(kTypeNames[static_cast<int>(type)]) + ", " + std::to_string(array.count);
  for (const double factor : {1.0, -0.3, 0x1p-20}) {
    for (const AccumulateMode mode : {AccumulateMode::kOverwrite, AccumulateMode::kAdd}) {
      check("accumulation of " + label, [&] {
        Array sum = before;
        const Accumulation piece{sum.as<float>(), array};
        Results results;
        results.add("square sum", accumulate({&piece, 1}, factor, mode, 1).value());
        results.add("accumulator", sum);
        return results;
      });
    }
    check("scaling of " + label, [&] {
      Array scaled = gradient;
      const ElementArray own{scaled.data(), type, scaled.count()};
      scale_elements({&own, 1}, factor, 1);
      Results results;
      results.add("array", scaled);
      return results;
    });
  }
  check("sums and search of " + label, [&] {
    Results results;
    results.add("square sum", sum_of_squares({&array, 1}, 1).value());
    const NonFinite found = find_non_finite({&array, 1}, 1);
    results.add("non-finite", static_cast<double>(found.count));
    results.add("first non-finite", static_cast<double>(found.index));
    return results;
  });
}

void check_gradients(Random& random) {
  for (const ElementType type : kTypes) {
    for (const Content content : kContents) {
      for (int i = 0; i < 8; ++i) {
        for (const size_t count : lengths(random)) {
          // Two statements: the order of arguments is the compiler's.
          const Array gradient = drawn(kind_of(type), count, random() % 67, content, random);
          const Array before =
              drawn(Kind::kFloat32, count, random() % 17 * sizeof(float), content, random);
          check_gradients_of(type, gradient, before);
        }
      }
    }
    if (type != ElementType::kFloat32) {
      Array every(kind_of(type), 1 << 16, 0);
      for (size_t i = 0; i < every.count(); ++i) every.set(i, static_cast<uint32_t>(i));
      const std::vector<uint32_t> zeros(every.count());
      check_gradients_of(type, every, floats(zeros));
    }
    print_digest(std::string("gradients ") + kTypeNames[static_cast<int>(type)]);
  }
}

// ---- conversions ----

void check_encoding(const Array& values, Signs signs) {
  check("encoding of " + std::to_string(values.count()) + " values", [&] {
    Array own = values;
    Array codes(Kind::kCode, own.count(), own.count() % 7);
    Array scales(Kind::kFloat32, block_count(own.count()), 0);
    encode_blockwise(own.as<float>(), signs, own.count(), codes.as<uint8_t>(), scales.as<float>(),
                     1);
    Results results;
    results.add("codes", codes, scales);
    Array decoded(Kind::kFloat32, own.count(), 4);
    decode_blockwise(codes.as<uint8_t>(), scales.as<float>(), signs, own.count(),
                     decoded.as<float>(), 1);
    results.add("decoded", decoded);
    return results;
  });
}

// Blocks whose largest value is 1, with all that lies beside the borders of decades and of codes.
Array border_values() {
  std::vector<uint32_t> bits;
  const auto add = [&](double value) {
    const auto middle = std::bit_cast<uint32_t>(static_cast<float>(value));
    for (uint32_t at = middle - 2; at != middle + 3; ++at) {
      if (bits.size() % kBlockElements == 0) bits.push_back(0x3f800000);
      bits.push_back(bits.size() % 2 == 0 ? at : at | 0x80000000U);
    }
  };
  for (int top = 6; top <= 7; ++top) {
    double lowest = 0.1;
    for (int e = 0; e < top; ++e) lowest /= 10;
    for (int e = 0; e <= top; ++e, lowest *= 10) {
      const int cells = 1 << e;
      for (int cell = 0; cell < cells; ++cell) add(lowest * (1 + 9.0 * cell / cells));
    }
  }
  return floats(bits, 12);
}

void check_blocks(Random& random) {
  Array codes(Kind::kCode, std::size(kSpecials) * kBlockElements, 3);
  for (size_t i = 0; i < codes.count(); ++i) codes.set(i, static_cast<uint32_t>(i));
  Array scales = floats(kSpecials);
  for (const Signs signs : {Signs::kSigned, Signs::kUnsigned}) {
    check("decoding of every code", [&] {
      Array decoded(Kind::kFloat32, codes.count(), 0);
      decode_blockwise(codes.as<uint8_t>(), scales.as<float>(), signs, codes.count(),
                       decoded.as<float>(), 1);
      Results results;
      results.add("decoded", decoded);
      return results;
    });
    Array borders = border_values();
    if (signs == Signs::kUnsigned) borders.drop_signs();
    check_encoding(borders, signs);
    for (const Content content : kContents) {
      for (int i = 0; i < 16; ++i) {
        for (const size_t count : lengths(random)) {
          Array values = drawn(Kind::kFloat32, count, random() % 17 * 4, content, random);
          if (signs == Signs::kUnsigned) values.drop_signs();
          check_encoding(values, signs);
        }
      }
    }
  }
  print_digest("8 bits");
}

void check_splitting(Random& random) {
  for (const Content content : kContents) {
    for (int i = 0; i < 16; ++i) {
      for (const size_t count : lengths(random)) {
        const size_t shift = random() % 17;
        Array weights = drawn(Kind::kFloat32, count, shift * 4, content, random);
        Array low = drawn(Kind::kBFloat16, count, shift * 2, content, random);
        Array remainder = drawn(Kind::kRemainder, count, shift * 2 + 2, content, random);
        check("split masters", [&] {
          Results results;
          Array joined(Kind::kFloat32, count, shift * 4);
          join_weights(low.as<uint16_t>(), remainder.as<int16_t>(), count, joined.as<float>(), 1);
          results.add("joined", joined);
          Array high(Kind::kBFloat16, count, shift * 2);
          Array rest(Kind::kRemainder, count, shift * 2 + 2);
          split_weights(weights.as<float>(), count, high.as<uint16_t>(), rest.as<int16_t>(), 1);
          results.add("low weight", high);
          results.add("remainder", rest);
          return results;
        });
      }
    }
  }
  print_digest("split masters");
}

}  // namespace

int main() {
  std::string sets;
  for (const std::string& set : instruction_sets()) sets += " " + set;
  std::printf("instruction sets:%s\n", sets.c_str());
  Random random(1);
  check_all_steps(random);
  check_rounding();
  check_streaming(random);
  check_surroundings(random);
  check_gradients(random);
  check_blocks(random);
  check_splitting(random);
  if (g_failure_count != 0) std::printf("FAILED: %d comparisons\n", g_failure_count);
  return g_failure_count == 0 ? 0 : 1;
}
