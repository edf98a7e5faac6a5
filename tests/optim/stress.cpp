// Callers at once on the threads that optimizer kernels share, in ranges and chunks of all sizes;
// built with sanitizers by tools/run_sanitizers.py. Every result is compared with that of one
// thread. Usage: stress SECONDS CALLERS SEED.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "optim/dispatch.hpp"
#include "optim/gradients.hpp"
#include "optim/thread_pool.hpp"
#include "optim/update.hpp"

namespace {

using namespace spillover;

std::atomic<bool> running{true};
std::atomic<bool> failed{false};
std::atomic<size_t> step_count{0};

// A parameter with bf16 moments and a low weight, cut into ranges.
struct Parameter {
  std::vector<float> gradient, weight;
  std::vector<uint16_t> first, second, low;

  Parameter(size_t count, std::minstd_rand& random)
      : gradient(count), weight(count), first(count), second(count), low(count) {
    for (size_t i = 0; i < count; ++i) {
      gradient[i] = static_cast<float>(random() % 2001) * 1e-3F - 1;
      weight[i] = static_cast<float>(random() % 2001) * 1e-3F - 1;
    }
  }

  std::vector<UpdateRange> ranges(size_t piece, int64_t step) {
    std::vector<UpdateRange> found;
    for (size_t begin = 0; begin < weight.size(); begin += piece) {
      UpdateRange& range = found.emplace_back();
      range.count = std::min(piece, weight.size() - begin);
      range.first_index = begin;
      range.step = step;
      range.gradient = &gradient[begin];
      range.weight = &weight[begin];
      range.low_weight = &low[begin];
      range.first = {MomentFormat::kBFloat16, &first[begin], nullptr};
      range.second = {MomentFormat::kBFloat16, &second[begin], nullptr};
    }
    return found;
  }

  bool operator==(const Parameter& other) const {
    const auto same = [](const auto& a, const auto& b) {
      return std::memcmp(a.data(), b.data(), a.size() * sizeof a[0]) == 0;
    };
    return same(weight, other.weight) && same(first, other.first) && same(second, other.second) &&
           same(low, other.low);
  }
};

void call(unsigned seed) {
  std::minstd_rand random(seed);
  while (running) {
    Parameter together(random() % 150000 + 1, random);
    Parameter alone = together;
    for (int64_t step = 1; step < 4; ++step) {
      const size_t piece = random() % together.weight.size() + 1 + random() % 40 * 256;
      update_adam(together.ranges(piece, step), {}, {.threads = static_cast<int>(random() % 5)});
      update_adam(alone.ranges(alone.weight.size(), step), {}, {.threads = 1});
    }
    const ElementArray array{together.weight.data(), ElementType::kFloat32, together.weight.size()};
    const double sum = sum_of_squares({&array, 1}, 4).value();
    if (!(together == alone) || sum != sum_of_squares({&array, 1}, 1).value()) failed = true;
    if (find_non_finite({&array, 1}, 3).count != 0) failed = true;
    ++step_count;
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const auto seed = static_cast<unsigned>(std::atoi(argv[3]));
  std::vector<std::thread> callers;
  for (int i = 0; i < std::atoi(argv[2]); ++i)
    callers.emplace_back(call, seed * 100 + static_cast<unsigned>(i) + 1);
  std::this_thread::sleep_for(std::chrono::seconds(std::atoi(argv[1])));
  running = false;
  for (std::thread& caller : callers) caller.join();
  std::printf("%zu rounds %s (%s)\n", step_count.load(), failed ? "and one that differs" : "agree",
              instruction_set().c_str());
  return failed || step_count == 0 ? 1 : 0;
}
