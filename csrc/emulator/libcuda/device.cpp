// Devices: how many, what they are, what they can do.
#include <array>
#include <cstdio>
#include <cstring>

#include "emulator/libcuda/api_call.hpp"
#include "emulator/libcuda/device_attributes.hpp"

namespace emulator = spillover::emulator;
using emulator::is_device;
using emulator::Lock;
using emulator::Machine;
using emulator::with_driver;

namespace {

constexpr const char* kDeviceName = "NVIDIA Emulated H100";

// A function of one device: body(Machine&) -> CUresult.
template <typename Body>
CUresult with_device(const char* name, CUdevice device, Body&& body) {
  return with_driver(name, [&](Machine& machine, Lock&) {
    return is_device(machine, device) ? body(machine) : CUDA_ERROR_INVALID_DEVICE;
  });
}

}  // namespace

extern "C" {

CUresult cuDeviceGetCount(int* count) {
  return with_driver(__func__, [=](Machine& machine, Lock&) {
    if (count == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *count = machine.device_count();
    return CUDA_SUCCESS;
  });
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  return with_device(__func__, ordinal, [=](Machine&) {
    if (device == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *device = ordinal;
    return CUDA_SUCCESS;
  });
}

CUresult cuDeviceGetName(char* name, int capacity, CUdevice device) {
  return with_device(__func__, device, [=](Machine&) {
    if (name == nullptr || capacity <= 0) return CUDA_ERROR_INVALID_VALUE;
    std::snprintf(name, static_cast<std::size_t>(capacity), "%s", kDeviceName);
    return CUDA_SUCCESS;
  });
}

CUresult cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice device) {
  return with_device(__func__, device, [=](Machine&) {
    if (uuid == nullptr) return CUDA_ERROR_INVALID_VALUE;
    std::memcpy(uuid->bytes, "spillover-emu-\0", sizeof uuid->bytes);
    uuid->bytes[15] = static_cast<char>(device);
    return CUDA_SUCCESS;
  });
}

CUresult cuDeviceTotalMem(std::size_t* size_bytes, CUdevice device) {
  return with_device(__func__, device, [=](Machine& machine) {
    if (size_bytes == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *size_bytes = machine.budget.capacity_bytes();
    return CUDA_SUCCESS;
  });
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  return with_device(__func__, device, [=](Machine&) {
    if (value == nullptr) return CUDA_ERROR_INVALID_VALUE;
    return emulator::device_attribute(device, attribute, value);
  });
}

CUresult cuDeviceComputeCapability(int* major, int* minor, CUdevice device) {
  return with_device(__func__, device, [=](Machine&) {
    if (major == nullptr || minor == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *major = emulator::kComputeCapabilityMajor;
    *minor = emulator::kComputeCapabilityMinor;
    return CUDA_SUCCESS;
  });
}

CUresult cuDeviceGetPCIBusId(char* text, int capacity, CUdevice device) {
  return with_device(__func__, device, [=](Machine&) {
    if (text == nullptr || capacity <= 0) return CUDA_ERROR_INVALID_VALUE;
    const int length = std::snprintf(text, static_cast<std::size_t>(capacity), "%04x:%02x:%02x.0",
                                     0, emulator::pci_bus(device), 0);
    return length < capacity ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
  });
}

CUresult cuDeviceGetByPCIBusId(CUdevice* device, const char* text) {
  return with_driver(__func__, [=](Machine& machine, Lock&) {
    unsigned domain = 0, bus = 0, slot = 0;
    if (device == nullptr || text == nullptr) return CUDA_ERROR_INVALID_VALUE;
    if (std::sscanf(text, "%x:%x:%x", &domain, &bus, &slot) != 3) {
      domain = 0;
      if (std::sscanf(text, "%x:%x", &bus, &slot) != 2) return CUDA_ERROR_INVALID_VALUE;
    }
    for (int ordinal = 0; ordinal < machine.device_count(); ++ordinal) {
      if (emulator::pci_bus(ordinal) != static_cast<int>(bus) || domain != 0 || slot != 0) continue;
      *device = ordinal;
      return CUDA_SUCCESS;
    }
    return CUDA_ERROR_INVALID_DEVICE;
  });
}

CUresult cuDeviceCanAccessPeer(int* can_access, CUdevice device, CUdevice peer) {
  return with_device(__func__, device, [=](Machine& machine) {
    if (can_access == nullptr) return CUDA_ERROR_INVALID_VALUE;
    if (!is_device(machine, peer)) return CUDA_ERROR_INVALID_DEVICE;
    *can_access = device != peer ? 1 : 0;
    return CUDA_SUCCESS;
  });
}

CUresult cuDeviceGetP2PAttribute(int* value, CUdevice_P2PAttribute attribute, CUdevice device,
                                 CUdevice peer) {
  return with_device(__func__, device, [=](Machine& machine) {
    if (!is_device(machine, peer) || device == peer) return CUDA_ERROR_INVALID_DEVICE;
    if (value == nullptr) return CUDA_ERROR_INVALID_VALUE;
    switch (attribute) {
      case CU_DEVICE_P2P_ATTRIBUTE_ACCESS_SUPPORTED:
        *value = 1;
        return CUDA_SUCCESS;
      case CU_DEVICE_P2P_ATTRIBUTE_PERFORMANCE_RANK:
      case CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED:
      case CU_DEVICE_P2P_ATTRIBUTE_CUDA_ARRAY_ACCESS_SUPPORTED:
        *value = 0;
        return CUDA_SUCCESS;
      default:
        return CUDA_ERROR_INVALID_VALUE;
    }
  });
}

}  // extern "C"
