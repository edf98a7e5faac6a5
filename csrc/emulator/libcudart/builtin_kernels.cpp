#include "emulator/libcudart/builtin_kernels.hpp"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <thread>

#include "emulator/core/kernel_api.h"
#include "emulator/libcudart/runtime.hpp"

namespace spillover::emulator::runtime {
namespace {

constexpr double kClockHz = 1.98e9;
constexpr std::chrono::duration<double> kSpinMax = std::chrono::milliseconds(50);

// torch.cuda._sleep(cycles): keeps its stream busy. The wall time is capped, since programs use it
// to force an order, and ordering here depends on schedules, not on how long something takes.
void spin(void** parameters, const spillover_emulator_launch_shape*, void*) {
  std::int64_t cycles = 0;
  std::memcpy(&cycles, parameters[0], sizeof cycles);
  if (cycles <= 0) return;
  const std::chrono::duration<double> wanted(static_cast<double>(cycles) / kClockHz);
  std::this_thread::sleep_for(std::min(wanted, kSpinMax));
}

struct Builtin {
  const char* name_part;
  spillover_emulator_kernel_body body;
  size_t parameter_bytes;  // of the only one that these have
};

constexpr Builtin kBuiltins[] = {
    {"spin_kernelEl", spin, sizeof(std::int64_t)},
};

}  // namespace

void provide_builtin(const char* name) {
  for (const Builtin& builtin : kBuiltins) {
    if (std::strstr(name, builtin.name_part) == nullptr) continue;
    const int result = spillover_emulator_register_kernel(name, builtin.body, nullptr,
                                                          &builtin.parameter_bytes, 1);
    if (result != 0) report("kernel %s could not be registered (error %d)", name, result);
  }
}

}  // namespace spillover::emulator::runtime
