// Random numbers on the emulated device. CUDA's generators count a Philox stream by (seed, offset);
// a CPU kernel needs a CPU generator. Each random operator takes a position from the CUDA
// generator, advances its offset, and runs on a CPU generator seeded by that position, so
// torch.cuda.manual_seed, saved states and their replay behave as on a GPU. The numbers differ from
// a GPU's. Any thread may call.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/ivalue.h>

#include <cstdint>

namespace spillover::emulator {

struct PhiloxPosition {
  uint64_t seed;
  uint64_t offset;
};

// The device's default CUDA generator.
at::Generator default_generator(c10::DeviceIndex device);

// The generator's position, after which its offset has moved on.
PhiloxPosition take_position(at::Generator generator);

// A CPU generator that depends on the position alone.
at::Generator generator_at(PhiloxPosition position);

// A CPU generator for an operator's generator argument: a CUDA generator, or None for the device's
// default one. Throws for a generator of another device, as torch does.
at::Generator host_generator(const c10::IValue& argument, c10::DeviceIndex device);

}  // namespace spillover::emulator
