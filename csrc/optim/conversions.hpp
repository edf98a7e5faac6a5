// Between fp32 and the formats of moments and masters that torch does not know: for checkpoints and
// for a state's beginning. Steps convert by themselves (update.hpp).
//
// Thread-safe where concurrent calls share no memory; the calls block, work on the shared threads
// and throw ConfigError before anything was changed. The arrays of a call have `count` elements
// each, scales block_count(count) of them, and share no bytes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "optim/elements.hpp"

namespace spillover {

// First moments are signed, second ones are not.
enum class Signs { kSigned, kUnsigned };

// Note [Formats of moments], 8 bits blockwise. What was decoded is encoded as it was.
void decode_blockwise(const uint8_t* codes, const float* scales, Signs signs, size_t count,
                      float* to, int threads);
void encode_blockwise(const float* from, Signs signs, size_t count, uint8_t* codes, float* scales,
                      int threads);

// weight bits = (low bits << 16) + remainder; low is bf16.
void join_weights(const uint16_t* low, const int16_t* remainder, size_t count, float* to,
                  int threads);
void split_weights(const float* from, size_t count, uint16_t* low, int16_t* remainder, int threads);

}  // namespace spillover
