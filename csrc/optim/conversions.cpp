#include "optim/conversions.hpp"

#include <vector>

#include "optim/chunks.hpp"
#include "optim/dispatch.hpp"
#include "optim/kernel_table.hpp"
#include "optim/memory_spans.hpp"

namespace spillover {
namespace {

void check(const std::vector<MemorySpan>& spans, const std::vector<size_t>& alignments) {
  const std::vector<size_t> owners(spans.size(), 0);
  for (size_t i = 0; i < spans.size(); ++i) check_span(spans[i], alignments[i], 0);
  check_apart(spans, owners);
}

}  // namespace

void decode_blockwise(const uint8_t* codes, const float* scales, Signs signs, size_t count,
                      float* to, int threads) {
  check({{"codes", codes, count, true, false},
         {"scales", scales, block_count(count) * 4, true, false},
         {"output", to, count * 4, false, true}},
        {1, 4, 4});
  const KernelTable& table = kernels();
  for_each_part({count}, threads, [&](size_t, size_t begin, size_t end) {
    table.decode_blocks(codes + begin, scales + begin / kBlockElements, signs, end - begin,
                        to + begin);
  });
}

void encode_blockwise(const float* from, Signs signs, size_t count, uint8_t* codes, float* scales,
                      int threads) {
  check({{"input", from, count * 4, true, false},
         {"codes", codes, count, false, true},
         {"scales", scales, block_count(count) * 4, false, true}},
        {4, 1, 4});
  const KernelTable& table = kernels();
  for_each_part({count}, threads, [&](size_t, size_t begin, size_t end) {
    table.encode_blocks(from + begin, signs, end - begin, codes + begin,
                        scales + begin / kBlockElements);
  });
}

void join_weights(const uint16_t* low, const int16_t* remainder, size_t count, float* to,
                  int threads) {
  check({{"low_weight", low, count * 2, true, false},
         {"remainder", remainder, count * 2, true, false},
         {"output", to, count * 4, false, true}},
        {2, 2, 4});
  const KernelTable& table = kernels();
  for_each_part({count}, threads, [&](size_t, size_t begin, size_t end) {
    table.join_weights(low + begin, remainder + begin, end - begin, to + begin);
  });
}

void split_weights(const float* from, size_t count, uint16_t* low, int16_t* remainder,
                   int threads) {
  check({{"input", from, count * 4, true, false},
         {"low_weight", low, count * 2, false, true},
         {"remainder", remainder, count * 2, false, true}},
        {4, 2, 2});
  const KernelTable& table = kernels();
  for_each_part({count}, threads, [&](size_t, size_t begin, size_t end) {
    table.split_weights(from + begin, end - begin, low + begin, remainder + begin);
  });
}

}  // namespace spillover
