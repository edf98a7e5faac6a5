// CUDA C++ for a compiler of the host: include this, then a .cu file. What NVRTC has built in is
// defined here: keywords, the launch's variables, barriers, warp functions, atomics. Vector types,
// half and bfloat16 are CUDA's own headers, which have code for the host (the folder include/ has
// what they miss, and belongs on the compiler's path).
//
// Dynamic shared memory ("extern __shared__ float tile[]") needs SPILLOVER_DYNAMIC_SHARED(float,
// tile) once, at namespace scope, beside the kernel.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cassert>
#include <cmath>
#include <cstdio>

#include "emulator/host_kernels/block.hpp"

#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __shared__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __constant__ static const
// A block runs on one thread, so what is the thread's is the block's. As on a GPU it is never
// initialised, and holds what the block before left.
#define __shared__ thread_local
#define __launch_bounds__(...)

#define SPILLOVER_DYNAMIC_SHARED(type, name) \
  alignas(16) thread_local type name[spillover::host_kernels::kDynamicSharedBytes / sizeof(type)]

namespace spillover::host_kernels {

inline constexpr std::size_t kDynamicSharedBytes = 232448;  // what a block may have on an H100

}  // namespace spillover::host_kernels

inline thread_local uint3 threadIdx{};
inline thread_local uint3 blockIdx{};
inline thread_local dim3 blockDim{};
inline thread_local dim3 gridDim{};
inline constexpr int warpSize = 32;

// Barriers.
inline void __syncthreads() {
  spillover::host_kernels::Block::current().wait_for_block(false);
}
inline int __syncthreads_count(int predicate) {
  return static_cast<int>(spillover::host_kernels::Block::current().wait_for_block(predicate != 0));
}
inline int __syncthreads_or(int predicate) {
  return __syncthreads_count(predicate) != 0 ? 1 : 0;
}
inline int __syncthreads_and(int predicate) {
  return __syncthreads_count(predicate == 0 ? 1 : 0) == 0 ? 1 : 0;
}
inline void __syncwarp(unsigned mask = ~0U) {
  spillover::host_kernels::Block::current().wait_for_warp(mask);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// Warp functions. A width splits the warp into groups that keep to themselves.
template <typename Value>
Value __shfl_sync(unsigned mask, Value value, int source, int width = 32) {
  auto& block = spillover::host_kernels::Block::current();
  const unsigned group = block.lane() / static_cast<unsigned>(width) * static_cast<unsigned>(width);
  return block.exchange(mask, value,
                        group + static_cast<unsigned>(source) % static_cast<unsigned>(width));
}
template <typename Value>
Value __shfl_down_sync(unsigned mask, Value value, unsigned delta, int width = 32) {
  auto& block = spillover::host_kernels::Block::current();
  const unsigned lane = block.lane(), place = lane % static_cast<unsigned>(width);
  const bool is_inside = place + delta < static_cast<unsigned>(width);
  return block.exchange(mask, value, is_inside ? lane + delta : lane);
}
template <typename Value>
Value __shfl_up_sync(unsigned mask, Value value, unsigned delta, int width = 32) {
  auto& block = spillover::host_kernels::Block::current();
  const unsigned lane = block.lane(), place = lane % static_cast<unsigned>(width);
  return block.exchange(mask, value, place >= delta ? lane - delta : lane);
}
template <typename Value>
Value __shfl_xor_sync(unsigned mask, Value value, int lanes, int width = 32) {
  auto& block = spillover::host_kernels::Block::current();
  const unsigned lane = block.lane(), source = lane ^ static_cast<unsigned>(lanes);
  // Into a later group the value stays; an earlier one may be read, as CUDA defines it.
  const bool is_later = source / static_cast<unsigned>(width) > lane / static_cast<unsigned>(width);
  return block.exchange(mask, value, is_later ? lane : source);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return spillover::host_kernels::Block::current().ballot(mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) != 0 ? 1 : 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate == 0 ? 1 : 0) == 0 ? 1 : 0;
}
// A hint on a GPU too: which lanes run together is nobody's promise.
inline unsigned __activemask() {
  return spillover::host_kernels::Block::current().live_lanes();
}

// Atomics, also among the launches that run at a time.
template <typename Value>
Value atomicAdd(Value* place, Value value) {
  return std::atomic_ref<Value>(*place).fetch_add(value);
}
template <typename Value>
Value atomicSub(Value* place, Value value) {
  return std::atomic_ref<Value>(*place).fetch_sub(value);
}
template <typename Value>
Value atomicExch(Value* place, Value value) {
  return std::atomic_ref<Value>(*place).exchange(value);
}
template <typename Value>
Value atomicCAS(Value* place, Value expected, Value value) {
  std::atomic_ref<Value>(*place).compare_exchange_strong(expected, value);
  return expected;
}
template <typename Value>
Value atomicMax(Value* place, Value value) {
  const std::atomic_ref<Value> atomic(*place);
  Value known = atomic.load();
  while (known < value && !atomic.compare_exchange_weak(known, value)) {
  }
  return known;
}
template <typename Value>
Value atomicMin(Value* place, Value value) {
  const std::atomic_ref<Value> atomic(*place);
  Value known = atomic.load();
  while (value < known && !atomic.compare_exchange_weak(known, value)) {
  }
  return known;
}
inline unsigned atomicOr(unsigned* place, unsigned value) {
  return std::atomic_ref<unsigned>(*place).fetch_or(value);
}
inline unsigned atomicAnd(unsigned* place, unsigned value) {
  return std::atomic_ref<unsigned>(*place).fetch_and(value);
}

// Memory and arithmetic.
template <typename Value>
Value __ldg(const Value* place) {
  return *place;
}
inline int __popc(unsigned value) {
  return std::popcount(value);
}
inline int __clz(int value) {
  return std::countl_zero(static_cast<unsigned>(value));
}
inline int __ffs(int value) {
  return value == 0 ? 0 : std::countr_zero(static_cast<unsigned>(value)) + 1;
}
inline float rsqrtf(float value) {
  return 1.0F / std::sqrt(value);
}
inline float __fmaf_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}
using std::max;
using std::min;
