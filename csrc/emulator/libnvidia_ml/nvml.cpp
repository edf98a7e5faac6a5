// Entry points of the emulated NVML: device handles, identity, memory, processes. What needs a real
// GPU (clocks, power, temperature, links) answers NVML_ERROR_NOT_SUPPORTED, as NVML does on devices
// that lack a sensor. Every function may be called from any thread.
#include <cuda.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <string>

#include "emulator/libnvidia_ml/nvml_types.hpp"

namespace {

// nvmlInit and nvmlShutdown nest.
std::atomic<int> users{0};

// A handle is the device's ordinal plus one, so that no handle is null.
nvmlDevice_t handle_of(int ordinal) {
  return reinterpret_cast<nvmlDevice_t>(static_cast<size_t>(ordinal) + 1);
}

int device_count() {
  int count = 0;
  return cuDeviceGetCount(&count) == CUDA_SUCCESS ? count : 0;
}

nvmlReturn_t device_of(nvmlDevice_t handle, CUdevice* device) {
  if (users.load() <= 0) return NVML_ERROR_UNINITIALIZED;
  const size_t number = reinterpret_cast<size_t>(handle);
  if (number == 0 || number > static_cast<size_t>(device_count())) {
    return NVML_ERROR_INVALID_ARGUMENT;
  }
  *device = static_cast<CUdevice>(number - 1);
  return NVML_SUCCESS;
}

int attribute_of(CUdevice device, CUdevice_attribute attribute) {
  int value = 0;
  return cuDeviceGetAttribute(&value, attribute, device) == CUDA_SUCCESS ? value : 0;
}

unsigned int unsigned_attribute_of(CUdevice device, CUdevice_attribute attribute) {
  return static_cast<unsigned int>(attribute_of(device, attribute));
}

nvmlReturn_t copy_text(const std::string& text, char* out, unsigned int capacity) {
  if (out == nullptr) return NVML_ERROR_INVALID_ARGUMENT;
  if (text.size() >= capacity) return NVML_ERROR_INSUFFICIENT_SIZE;
  std::memcpy(out, text.c_str(), text.size() + 1);
  return NVML_SUCCESS;
}

std::string uuid_of(CUdevice device) {
  CUuuid uuid{};
  if (cuDeviceGetUuid(&uuid, device) != CUDA_SUCCESS) return {};
  std::string text = "GPU-";
  for (size_t index = 0; index < sizeof uuid.bytes; ++index) {
    if (index == 4 || index == 6 || index == 8 || index == 10) text += '-';
    char digits[3];
    std::snprintf(digits, sizeof digits, "%02x", static_cast<unsigned char>(uuid.bytes[index]));
    text += digits;
  }
  return text;
}

// Memory of a device as this process sees it. A device without a context has nothing in use, and
// asking must not make one.
nvmlReturn_t memory_of(CUdevice device, nvmlMemory_t& memory) {
  size_t free_bytes = 0;
  size_t total_bytes = 0;
  unsigned int flags = 0;
  int active = 0;
  if (cuDeviceTotalMem(&total_bytes, device) != CUDA_SUCCESS) return NVML_ERROR_UNKNOWN;
  free_bytes = total_bytes;
  if (cuDevicePrimaryCtxGetState(device, &flags, &active) == CUDA_SUCCESS && active != 0) {
    CUcontext context = nullptr;
    if (cuDevicePrimaryCtxRetain(&context, device) != CUDA_SUCCESS) return NVML_ERROR_UNKNOWN;
    CUresult result = cuCtxPushCurrent(context);
    if (result == CUDA_SUCCESS) {
      result = cuMemGetInfo(&free_bytes, &total_bytes);
      CUcontext popped = nullptr;
      if (cuCtxPopCurrent(&popped) != CUDA_SUCCESS) result = CUDA_ERROR_UNKNOWN;
    }
    if (cuDevicePrimaryCtxRelease(device) != CUDA_SUCCESS || result != CUDA_SUCCESS) {
      return NVML_ERROR_UNKNOWN;
    }
  }
  memory = {total_bytes, free_bytes, total_bytes - free_bytes};
  return NVML_SUCCESS;
}

// This process is the only one that can be on an emulated device.
template <typename ProcessInfo>
nvmlReturn_t running_processes(nvmlDevice_t handle, unsigned int* count, ProcessInfo* processes) {
  CUdevice device = 0;
  nvmlReturn_t result = device_of(handle, &device);
  if (result != NVML_SUCCESS) return result;
  if (count == nullptr) return NVML_ERROR_INVALID_ARGUMENT;
  nvmlMemory_t memory{};
  result = memory_of(device, memory);
  if (result != NVML_SUCCESS) return result;
  const unsigned int capacity = *count;
  *count = memory.used > 0 ? 1 : 0;
  if (capacity < *count) return NVML_ERROR_INSUFFICIENT_SIZE;
  if (*count == 0) return NVML_SUCCESS;
  if (processes == nullptr) return NVML_ERROR_INVALID_ARGUMENT;
  processes[0] = ProcessInfo{};
  processes[0].pid = static_cast<unsigned int>(getpid());
  processes[0].usedGpuMemory = memory.used;
  if constexpr (requires { processes[0].gpuInstanceId; }) {
    processes[0].gpuInstanceId = ~0U;  // there is no MIG
    processes[0].computeInstanceId = ~0U;
  }
  return NVML_SUCCESS;
}

template <typename Match>
nvmlReturn_t find_device(nvmlDevice_t* handle, Match&& matches) {
  if (users.load() <= 0) return NVML_ERROR_UNINITIALIZED;
  if (handle == nullptr) return NVML_ERROR_INVALID_ARGUMENT;
  for (int device = 0; device < device_count(); ++device) {
    if (!matches(device)) continue;
    *handle = handle_of(device);
    return NVML_SUCCESS;
  }
  return NVML_ERROR_NOT_FOUND;
}

}  // namespace

extern "C" {

nvmlReturn_t nvmlInit_v2() {
  if (cuInit(0) != CUDA_SUCCESS) return NVML_ERROR_DRIVER_NOT_LOADED;
  users.fetch_add(1);
  return NVML_SUCCESS;
}

nvmlReturn_t nvmlInit() {
  return nvmlInit_v2();
}

nvmlReturn_t nvmlInitWithFlags(unsigned int) {
  return nvmlInit_v2();
}

nvmlReturn_t nvmlShutdown() {
  int count = users.load();
  while (count > 0) {
    if (users.compare_exchange_weak(count, count - 1)) return NVML_SUCCESS;
  }
  return NVML_ERROR_UNINITIALIZED;
}

const char* nvmlErrorString(nvmlReturn_t result) {
  switch (result) {
    case NVML_SUCCESS:
      return "Success";
    case NVML_ERROR_UNINITIALIZED:
      return "Uninitialized";
    case NVML_ERROR_INVALID_ARGUMENT:
      return "Invalid Argument";
    case NVML_ERROR_NOT_SUPPORTED:
      return "Not Supported";
    case NVML_ERROR_NOT_FOUND:
      return "Not Found";
    case NVML_ERROR_INSUFFICIENT_SIZE:
      return "Insufficient Size";
    case NVML_ERROR_DRIVER_NOT_LOADED:
      return "Driver Not Loaded";
    case NVML_ERROR_ARGUMENT_VERSION_MISMATCH:
      return "Argument version mismatch";
    default:
      return "Unknown Error";
  }
}

nvmlReturn_t nvmlSystemGetCudaDriverVersion_v2(int* version) {
  if (version == nullptr) return NVML_ERROR_INVALID_ARGUMENT;
  return cuDriverGetVersion(version) == CUDA_SUCCESS ? NVML_SUCCESS : NVML_ERROR_UNKNOWN;
}

nvmlReturn_t nvmlSystemGetCudaDriverVersion(int* version) {
  return nvmlSystemGetCudaDriverVersion_v2(version);
}

nvmlReturn_t nvmlSystemGetDriverVersion(char* text, unsigned int capacity) {
  int version = 0;
  const nvmlReturn_t result = nvmlSystemGetCudaDriverVersion_v2(&version);
  if (result != NVML_SUCCESS) return result;
  return copy_text("emulated for CUDA " + std::to_string(version / 1000) + "." +
                       std::to_string(version % 1000 / 10),
                   text, capacity);
}

nvmlReturn_t nvmlDeviceGetCount_v2(unsigned int* count) {
  if (users.load() <= 0) return NVML_ERROR_UNINITIALIZED;
  if (count == nullptr) return NVML_ERROR_INVALID_ARGUMENT;
  *count = static_cast<unsigned int>(device_count());
  return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetCount(unsigned int* count) {
  return nvmlDeviceGetCount_v2(count);
}

nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned int index, nvmlDevice_t* handle) {
  if (users.load() > 0 && index >= static_cast<unsigned int>(device_count())) {
    return NVML_ERROR_INVALID_ARGUMENT;
  }
  return find_device(handle,
                     [=](int device) { return static_cast<unsigned int>(device) == index; });
}

nvmlReturn_t nvmlDeviceGetHandleByIndex(unsigned int index, nvmlDevice_t* handle) {
  return nvmlDeviceGetHandleByIndex_v2(index, handle);
}

nvmlReturn_t nvmlDeviceGetHandleByUUID(const char* uuid, nvmlDevice_t* handle) {
  if (uuid == nullptr) return NVML_ERROR_INVALID_ARGUMENT;
  return find_device(handle, [=](int device) { return uuid_of(device) == uuid; });
}

nvmlReturn_t nvmlDeviceGetHandleByPciBusId_v2(const char* text, nvmlDevice_t* handle) {
  unsigned int bus = 0;
  unsigned int slot = 0;
  // "domain:bus:device.function" or "bus:device.function"; the domain is 0 on every device here.
  if (text == nullptr || (std::sscanf(text, "%*x:%x:%x.", &bus, &slot) != 2 &&
                          std::sscanf(text, "%x:%x.", &bus, &slot) != 2)) {
    return NVML_ERROR_INVALID_ARGUMENT;
  }
  return find_device(handle, [=](int device) {
    return unsigned_attribute_of(device, CU_DEVICE_ATTRIBUTE_PCI_BUS_ID) == bus &&
           unsigned_attribute_of(device, CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID) == slot;
  });
}

nvmlReturn_t nvmlDeviceGetHandleByPciBusId(const char* text, nvmlDevice_t* handle) {
  return nvmlDeviceGetHandleByPciBusId_v2(text, handle);
}

nvmlReturn_t nvmlDeviceGetIndex(nvmlDevice_t handle, unsigned int* index) {
  CUdevice device = 0;
  const nvmlReturn_t result = device_of(handle, &device);
  if (result != NVML_SUCCESS) return result;
  if (index == nullptr) return NVML_ERROR_INVALID_ARGUMENT;
  *index = static_cast<unsigned int>(device);
  return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t handle, char* text, unsigned int capacity) {
  CUdevice device = 0;
  const nvmlReturn_t result = device_of(handle, &device);
  if (result != NVML_SUCCESS) return result;
  char name[256] = {};
  if (cuDeviceGetName(name, sizeof name, device) != CUDA_SUCCESS) return NVML_ERROR_UNKNOWN;
  return copy_text(name, text, capacity);
}

nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t handle, char* text, unsigned int capacity) {
  CUdevice device = 0;
  const nvmlReturn_t result = device_of(handle, &device);
  return result == NVML_SUCCESS ? copy_text(uuid_of(device), text, capacity) : result;
}

nvmlReturn_t nvmlDeviceGetPciInfo_v3(nvmlDevice_t handle, nvmlPciInfo_t* info) {
  CUdevice device = 0;
  const nvmlReturn_t result = device_of(handle, &device);
  if (result != NVML_SUCCESS) return result;
  if (info == nullptr) return NVML_ERROR_INVALID_ARGUMENT;
  *info = nvmlPciInfo_t{};
  info->domain = unsigned_attribute_of(device, CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID);
  info->bus = unsigned_attribute_of(device, CU_DEVICE_ATTRIBUTE_PCI_BUS_ID) & 0xFFU;
  info->device = unsigned_attribute_of(device, CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID) & 0x1FU;
  std::snprintf(info->busIdLegacy, sizeof info->busIdLegacy, "%04X:%02X:%02X.0",
                info->domain & 0xFFFFU, info->bus, info->device);
  std::snprintf(info->busId, sizeof info->busId, "%08X:%02X:%02X.0", info->domain, info->bus,
                info->device);
  return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetCudaComputeCapability(nvmlDevice_t handle, int* major, int* minor) {
  CUdevice device = 0;
  const nvmlReturn_t result = device_of(handle, &device);
  if (result != NVML_SUCCESS) return result;
  if (major == nullptr || minor == nullptr) return NVML_ERROR_INVALID_ARGUMENT;
  *major = attribute_of(device, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
  *minor = attribute_of(device, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
  return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t handle, nvmlMemory_t* memory) {
  CUdevice device = 0;
  const nvmlReturn_t result = device_of(handle, &device);
  if (result != NVML_SUCCESS) return result;
  return memory != nullptr ? memory_of(device, *memory) : NVML_ERROR_INVALID_ARGUMENT;
}

nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t handle, nvmlMemory_v2_t* memory) {
  CUdevice device = 0;
  nvmlReturn_t result = device_of(handle, &device);
  if (result != NVML_SUCCESS) return result;
  if (memory == nullptr) return NVML_ERROR_INVALID_ARGUMENT;
  if (memory->version != nvml_struct_version(sizeof *memory, 2)) {
    return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
  }
  nvmlMemory_t plain{};
  result = memory_of(device, plain);
  if (result != NVML_SUCCESS) return result;
  memory->total = plain.total;
  memory->reserved = 0;
  memory->free = plain.free;
  memory->used = plain.used;
  return NVML_SUCCESS;
}

nvmlReturn_t nvmlDeviceGetComputeRunningProcesses(nvmlDevice_t handle, unsigned int* count,
                                                  nvmlProcessInfo_v1_t* processes) {
  return running_processes(handle, count, processes);
}

nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v2(nvmlDevice_t handle, unsigned int* count,
                                                     nvmlProcessInfo_v2_t* processes) {
  return running_processes(handle, count, processes);
}

nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t handle, unsigned int* count,
                                                     nvmlProcessInfo_v2_t* processes) {
  return running_processes(handle, count, processes);
}

}  // extern "C"
