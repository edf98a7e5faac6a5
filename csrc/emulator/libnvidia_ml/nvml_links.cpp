// What NVML tells about links and sensors, none of which an emulated device has. The functions
// exist, because torch and NCCL look all of theirs up at once and disable NVML where one is
// missing.
#include <cstring>
#include <utility>

#include "emulator/libnvidia_ml/nvml_types.hpp"

namespace {

constexpr unsigned int kPeerOk = 0;            // NVML_P2P_STATUS_OK
constexpr unsigned int kPeerNotSupported = 5;  // NVML_P2P_STATUS_NOT_SUPPORTED

// What two devices may be able to do with each other (nvmlGpuP2PCapsIndex_t).
enum PeerCapability { kRead, kWrite, kNvLink, kAtomics, kPci, kCapabilities };

}  // namespace

extern "C" {

nvmlReturn_t nvmlDeviceGetIndex(nvmlDevice_t handle, unsigned int* index);  // nvml.cpp

// Success with a state of "not supported": torch 2.14 takes an error for a broken driver and goes
// on to use what was never filled in.
nvmlReturn_t nvmlDeviceGetGpuFabricInfoV(nvmlDevice_t handle, nvmlGpuFabricInfo_v2_t* info) {
  if (handle == nullptr || info == nullptr) return NVML_ERROR_INVALID_ARGUMENT;
  const unsigned int version = info->version;
  std::memset(info, 0, sizeof *info);
  info->version = version;
  info->status = NVML_ERROR_NOT_SUPPORTED;
  info->state = NVML_GPU_FABRIC_STATE_NOT_SUPPORTED;
  return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetP2PStatus(nvmlDevice_t first, nvmlDevice_t second, int capability,
                                    unsigned int* status) {
  unsigned int indices[2] = {};
  for (const auto& [handle, index] : {std::pair(first, &indices[0]), {second, &indices[1]}}) {
    const nvmlReturn_t result = nvmlDeviceGetIndex(handle, index);
    if (result != NVML_SUCCESS) return result;
  }
  if (status == nullptr || capability < 0 || capability >= kCapabilities ||
      indices[0] == indices[1]) {
    return NVML_ERROR_INVALID_ARGUMENT;
  }
  const bool can = capability == kRead || capability == kWrite || capability == kPci;
  *status = can ? kPeerOk : kPeerNotSupported;
  return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetNvLinkState(nvmlDevice_t, unsigned int, unsigned int*) {
  return NVML_ERROR_NOT_SUPPORTED;
}

nvmlReturn_t nvmlDeviceGetNvLinkCapability(nvmlDevice_t, unsigned int, int, unsigned int*) {
  return NVML_ERROR_NOT_SUPPORTED;
}

nvmlReturn_t nvmlDeviceGetNvLinkRemoteDeviceType(nvmlDevice_t, unsigned int, int*) {
  return NVML_ERROR_NOT_SUPPORTED;
}

nvmlReturn_t nvmlDeviceGetNvLinkRemotePciInfo_v2(nvmlDevice_t, unsigned int, nvmlPciInfo_t*) {
  return NVML_ERROR_NOT_SUPPORTED;
}

nvmlReturn_t nvmlDeviceGetFieldValues(nvmlDevice_t, int, void*) {
  return NVML_ERROR_NOT_SUPPORTED;
}

nvmlReturn_t nvmlDeviceGetUtilizationRates(nvmlDevice_t, nvmlUtilization_t*) {
  return NVML_ERROR_NOT_SUPPORTED;
}

nvmlReturn_t nvmlDeviceGetTemperature(nvmlDevice_t, int, unsigned int*) {
  return NVML_ERROR_NOT_SUPPORTED;
}

nvmlReturn_t nvmlDeviceGetPowerUsage(nvmlDevice_t, unsigned int*) {
  return NVML_ERROR_NOT_SUPPORTED;
}

nvmlReturn_t nvmlDeviceGetClockInfo(nvmlDevice_t, int, unsigned int*) {
  return NVML_ERROR_NOT_SUPPORTED;
}

}  // extern "C"
