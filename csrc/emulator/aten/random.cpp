#include "emulator/aten/random.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>

#include <mutex>

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

}  // namespace

at::Generator default_generator(c10::DeviceIndex device) {
  return at::cuda::detail::getDefaultCUDAGenerator(device);
}

PhiloxPosition take_position(at::Generator generator) {
  const std::lock_guard<std::mutex> lock(generator.mutex());
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
