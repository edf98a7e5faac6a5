#include <array>
#include <cstdio>
#include <cstring>

#include "emulator/libcudart/kernels.hpp"
#include "emulator/libcudart/runtime.hpp"

namespace runtime = spillover::emulator::runtime;
using runtime::attribute_of;
using runtime::with_context;
using runtime::with_driver;

namespace {

// All pinned memory is mapped; the runtime says so of every device.
constexpr unsigned int kImplicitFlags = cudaDeviceMapHost;

static_assert(static_cast<int>(cudaDeviceScheduleBlockingSync) ==
              static_cast<int>(CU_CTX_SCHED_BLOCKING_SYNC));

CUresult check_device(int device) {
  CUdevice handle = 0;
  return cuDeviceGet(&handle, device);
}

CUresult pci_bus_id(char* text, int capacity, CUdevice device) {
  if (text == nullptr) return CUDA_ERROR_INVALID_VALUE;
  std::array<char, 16> id{};
  const int length = std::snprintf(id.data(), id.size(), "%04x:%02x:%02x.0",
                                   attribute_of(device, CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID),
                                   attribute_of(device, CU_DEVICE_ATTRIBUTE_PCI_BUS_ID),
                                   attribute_of(device, CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID));
  if (length >= capacity) return CUDA_ERROR_INVALID_VALUE;
  std::memcpy(text, id.data(), static_cast<size_t>(length) + 1);
  return CUDA_SUCCESS;
}

// The context of another device, since no device is its own peer.
CUresult find_peer(int peer, CUcontext* context) {
  CUdevice device = 0;
  CUresult result = check_device(peer);
  if (result == CUDA_SUCCESS) result = runtime::current_device(&device);
  if (result == CUDA_SUCCESS && device == peer) result = CUDA_ERROR_INVALID_DEVICE;
  return result == CUDA_SUCCESS ? runtime::primary_context(peer, context) : result;
}

}  // namespace

extern "C" {

cudaError_t cudaDriverGetVersion(int* version) {
  return runtime::plain(__func__, [=] { return cuDriverGetVersion(version); });
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  return runtime::plain(__func__, [=] {
    if (version == nullptr) return cudaErrorInvalidValue;
    *version = CUDART_VERSION;
    return cudaSuccess;
  });
}

cudaError_t cudaGetDeviceCount(int* count) {
  return with_driver(__func__, [=] { return cuDeviceGetCount(count); });
}

cudaError_t cudaGetDevice(int* device) {
  return with_driver(__func__, [=] {
    return device == nullptr ? CUDA_ERROR_INVALID_VALUE : runtime::current_device(device);
  });
}

cudaError_t cudaSetDevice(int device) {
  return with_driver(__func__, [=] {
    const CUresult result = check_device(device);
    return result == CUDA_SUCCESS ? runtime::use_device(device) : result;
  });
}

cudaError_t cudaInitDevice(int device, unsigned int device_flags, unsigned int flags) {
  return with_driver(__func__, [=] {
    CUresult result = check_device(device);
    if (result == CUDA_SUCCESS && (flags & cudaInitDeviceFlagsAreValid) != 0) {
      result = cuDevicePrimaryCtxSetFlags(device, device_flags & ~kImplicitFlags);
    }
    if (result != CUDA_SUCCESS) return result;
    CUcontext context = nullptr;
    return runtime::primary_context(device, &context);
  });
}

// They choose how a host thread waits for a GPU, which makes no difference here.
cudaError_t cudaSetDeviceFlags(unsigned int flags) {
  return with_driver(__func__, [=] {
    CUdevice device = 0;
    const CUresult result = runtime::current_device(&device);
    return result == CUDA_SUCCESS ? cuDevicePrimaryCtxSetFlags(device, flags & ~kImplicitFlags)
                                  : result;
  });
}

cudaError_t cudaGetDeviceFlags(unsigned int* flags) {
  return with_driver(__func__, [=] {
    if (flags == nullptr) return CUDA_ERROR_INVALID_VALUE;
    CUdevice device = 0;
    int is_active = 0;
    CUresult result = runtime::current_device(&device);
    if (result == CUDA_SUCCESS) result = cuDevicePrimaryCtxGetState(device, flags, &is_active);
    if (result == CUDA_SUCCESS) *flags |= kImplicitFlags;
    return result;
  });
}

cudaError_t cudaDeviceReset() {
  return with_driver(__func__, [] {
    CUdevice device = 0;
    CUresult result = runtime::current_device(&device);
    if (result != CUDA_SUCCESS) return result;
    runtime::forget_device_variables(device);
    return runtime::reset_device(device);
  });
}

cudaError_t cudaDeviceSynchronize() {
  return with_context(__func__, [] { return cuCtxSynchronize(); });
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  return with_driver(__func__, [=] {
    const CUresult result = check_device(device);
    if (result != CUDA_SUCCESS) return result;
    // cudaDevAttr* and CU_DEVICE_ATTRIBUTE_* have the same numbers.
    return cuDeviceGetAttribute(value, static_cast<CUdevice_attribute>(attribute), device);
  });
}

cudaError_t cudaDeviceGetPCIBusId(char* text, int capacity, int device) {
  return with_driver(__func__, [=] {
    const CUresult result = check_device(device);
    return result == CUDA_SUCCESS ? pci_bus_id(text, capacity, device) : result;
  });
}

cudaError_t cudaDeviceGetByPCIBusId(int* device, const char* text) {
  return with_driver(__func__, [=] {
    unsigned int domain = 0, bus = 0, slot = 0;
    if (device == nullptr || text == nullptr ||
        (std::sscanf(text, "%x:%x:%x", &domain, &bus, &slot) != 3 &&
         std::sscanf(text, "%x:%x", &bus, &slot) != 2)) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    int count = 0;
    const CUresult result = cuDeviceGetCount(&count);
    if (result != CUDA_SUCCESS) return result;
    for (int candidate = 0; candidate < count; ++candidate) {
      if (attribute_of(candidate, CU_DEVICE_ATTRIBUTE_PCI_BUS_ID) == static_cast<int>(bus) &&
          attribute_of(candidate, CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID) == static_cast<int>(slot)) {
        *device = candidate;
        return CUDA_SUCCESS;
      }
    }
    return CUDA_ERROR_INVALID_DEVICE;
  });
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return with_context(__func__, [=] { return cuCtxGetStreamPriorityRange(least, greatest); });
}

cudaError_t cudaDeviceGetLimit(size_t* value, cudaLimit limit) {
  return with_context(__func__, [=] { return cuCtxGetLimit(value, static_cast<CUlimit>(limit)); });
}

cudaError_t cudaDeviceSetLimit(cudaLimit limit, size_t value) {
  return with_context(__func__, [=] { return cuCtxSetLimit(static_cast<CUlimit>(limit), value); });
}

cudaError_t cudaDeviceCanAccessPeer(int* can_access, int device, int peer) {
  return with_driver(__func__, [=] { return cuDeviceCanAccessPeer(can_access, device, peer); });
}

cudaError_t cudaDeviceGetP2PAttribute(int* value, cudaDeviceP2PAttr attribute, int device,
                                      int peer) {
  return with_driver(__func__, [=] {
    // cudaDevP2PAttr* and CU_DEVICE_P2P_ATTRIBUTE_* have the same numbers.
    return cuDeviceGetP2PAttribute(value, static_cast<CUdevice_P2PAttribute>(attribute), device,
                                   peer);
  });
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned int flags) {
  return with_context(__func__, [=] {
    CUcontext context = nullptr;
    const CUresult result = find_peer(peer, &context);
    return result == CUDA_SUCCESS ? cuCtxEnablePeerAccess(context, flags) : result;
  });
}

cudaError_t cudaDeviceDisablePeerAccess(int peer) {
  return with_context(__func__, [=] {
    CUcontext context = nullptr;
    const CUresult result = find_peer(peer, &context);
    return result == CUDA_SUCCESS ? cuCtxDisablePeerAccess(context) : result;
  });
}

}  // extern "C"
