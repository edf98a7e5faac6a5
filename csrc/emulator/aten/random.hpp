// Random numbers on the emulated device. CUDA's generators count a Philox stream by (seed, offset);
// a CPU kernel needs a CPU generator. Each random operator takes a position from the CUDA
// generator, advances its offset, and runs on a CPU generator seeded by that position, so
// torch.cuda.manual_seed, saved states and their replay behave as on a GPU. The numbers differ from
// a GPU's. Any thread may call.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/ivalue.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace spillover::emulator {

struct PhiloxPosition {
  uint64_t seed;
  uint64_t offset;
};

// A position whose seed and offset lie in device memory, where torch puts new ones before it
// replays a graph.
struct CapturedPosition {
  const int64_t* seed;
  const int64_t* offset;
  uint64_t offset_in_graph;
};

// While one lives, the thread's operators are captured: positions that they take are noted.
class RecordedPositions {
 public:
  explicit RecordedPositions(std::vector<CapturedPosition>* positions);
  ~RecordedPositions();
  RecordedPositions(const RecordedPositions&) = delete;
  RecordedPositions& operator=(const RecordedPositions&) = delete;
};

// While one lives, the thread replays an operator: it takes these positions, one after the other.
class ReplayedPositions {
 public:
  explicit ReplayedPositions(const std::vector<CapturedPosition>& positions);
  ~ReplayedPositions();
  ReplayedPositions(const ReplayedPositions&) = delete;
  ReplayedPositions& operator=(const ReplayedPositions&) = delete;

 private:
  const std::vector<CapturedPosition>* outer_;  // replays nest where one thread runs another's work
  size_t outer_next_;
};

// The generator for a replayed operator's generator argument.
at::Generator replayed_generator();

// The position of the current device's default generator, which a kernel of our own asks for.
PhiloxPosition take_default_position();

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
