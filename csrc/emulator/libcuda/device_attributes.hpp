// What cuDeviceGetAttribute answers: the limits of an H100, and of the emulated features those that
// exist. Stateless; any thread may call.
#pragma once

#include <cuda.h>

namespace spillover::emulator {

inline constexpr int kComputeCapabilityMajor = 9;
inline constexpr int kComputeCapabilityMinor = 0;

inline int pci_bus(CUdevice device) {
  return device + 1;
}

// CUDA_ERROR_INVALID_VALUE for an attribute that CUDA does not define; features that are not
// emulated are 0.
CUresult device_attribute(CUdevice device, CUdevice_attribute attribute, int* value);

}  // namespace spillover::emulator
