// Complex numbers of two bfloat16, where the installed torch has them: CUDA's spectra of bfloat16.
#pragma once

#include <c10/core/ScalarType.h>
#include <torch/headeronly/version.h>

namespace spillover::emulator {

#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR >= 14
inline constexpr auto kBrainComplex = c10::ScalarType::BComplex32;
#else
inline constexpr auto kBrainComplex = c10::ScalarType::Undefined;
#endif

}  // namespace spillover::emulator
