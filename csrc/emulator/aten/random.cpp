#include "emulator/aten/random.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <c10/cuda/CUDAFunctions.h>

#include <mutex>
#include <utility>

#include "emulator/core/c_api.h"

namespace spillover::emulator {
namespace {

// Philox makes four 32-bit numbers a step, and CUDA's generator insists on multiples of four.
constexpr uint64_t kOffsetStep = 4;

// SplitMix64's finaliser: CPU generators use the low 32 bits of a seed only, so all bits must count
// there.
uint64_t mix(uint64_t value) {
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9ULL;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EBULL;
  return value ^ (value >> 31);
}

thread_local std::vector<CapturedPosition>* recorded = nullptr;
thread_local const std::vector<CapturedPosition>* replayed = nullptr;
thread_local size_t next_replayed = 0;

// The numbers of a capture are never seen, so any will do.
PhiloxPosition record_position(const at::Generator& generator) {
  auto* const impl = at::check_generator<at::CUDAGeneratorImpl>(generator);
  const at::PhiloxCudaState state = impl->philox_cuda_state(kOffsetStep);
  TORCH_CHECK(state.captured_,
              "spillover emulator: a random operator is being captured on a stream "
              "that is not its device's current one");
  recorded->push_back({state.seed_.ptr, state.offset_.ptr, state.offset_intragraph_});
  return {0, state.offset_intragraph_};
}

int64_t load(const int64_t* pointer) {
  return *static_cast<const int64_t*>(spillover_emulator_host_pointer(pointer));
}

PhiloxPosition replay_position() {
  TORCH_CHECK(next_replayed < replayed->size(),
              "an operator draws more random numbers than when it was captured");
  const CapturedPosition& position = (*replayed)[next_replayed++];
  return {static_cast<uint64_t>(load(position.seed)),
          static_cast<uint64_t>(load(position.offset)) + position.offset_in_graph};
}

}  // namespace

RecordedPositions::RecordedPositions(std::vector<CapturedPosition>* positions) {
  recorded = positions;
}
RecordedPositions::~RecordedPositions() {
  recorded = nullptr;
}

ReplayedPositions::ReplayedPositions(const std::vector<CapturedPosition>& positions)
    : outer_(std::exchange(replayed, &positions)), outer_next_(std::exchange(next_replayed, 0)) {}
ReplayedPositions::~ReplayedPositions() {
  replayed = outer_;
  next_replayed = outer_next_;
}

at::Generator replayed_generator() {
  return generator_at(replay_position());
}

PhiloxPosition take_default_position() {
  // A replay must not ask CUDA for the current device.
  if (replayed != nullptr) return replay_position();
  return take_position(default_generator(c10::cuda::current_device()));
}

at::Generator default_generator(c10::DeviceIndex device) {
  return at::cuda::detail::getDefaultCUDAGenerator(device);
}

PhiloxPosition take_position(at::Generator generator) {
  const std::lock_guard<std::mutex> lock(generator.mutex());
  if (recorded != nullptr) return record_position(generator);
  const PhiloxPosition position{generator.current_seed(), generator.get_offset()};
  generator.set_offset(position.offset + kOffsetStep);
  return position;
}

at::Generator generator_at(PhiloxPosition position) {
  constexpr uint64_t kGoldenRatio = 0x9E3779B97F4A7C15ULL;
  return at::detail::createCPUGenerator(
      mix(mix(position.seed + kGoldenRatio) + position.offset * kGoldenRatio));
}

at::Generator host_generator(const c10::IValue& argument, c10::DeviceIndex device) {
  if (argument.isNone()) return generator_at(take_position(default_generator(device)));
  at::Generator generator = argument.toGenerator();
  if (!generator.defined()) return generator_at(take_position(default_generator(device)));
  TORCH_CHECK(generator.device().is_cuda(),
              "Expected a 'cuda' device type for generator but found '", generator.device().type(),
              "'");
  return generator_at(take_position(generator));
}

}  // namespace spillover::emulator
