#include "emulator/libcuda/device_attributes.hpp"

#include <iterator>

#include "emulator/core/config.hpp"

namespace spillover::emulator {
namespace {

struct Row {
  CUdevice_attribute attribute;
  int value;
};

// clang-format off
#define ROW(name, value) {CU_DEVICE_ATTRIBUTE_##name, value}

constexpr Row kRows[] = {
    ROW(COMPUTE_CAPABILITY_MAJOR, kComputeCapabilityMajor),
    ROW(COMPUTE_CAPABILITY_MINOR, kComputeCapabilityMinor),
    // The SM array and its memories.
    ROW(MULTIPROCESSOR_COUNT, 132),
    ROW(WARP_SIZE, 32),
    ROW(MAX_THREADS_PER_BLOCK, 1024),
    ROW(MAX_THREADS_PER_MULTIPROCESSOR, 2048),
    ROW(MAX_BLOCKS_PER_MULTIPROCESSOR, 32),
    ROW(MAX_BLOCK_DIM_X, 1024),
    ROW(MAX_BLOCK_DIM_Y, 1024),
    ROW(MAX_BLOCK_DIM_Z, 64),
    ROW(MAX_GRID_DIM_X, 2147483647),
    ROW(MAX_GRID_DIM_Y, 65535),
    ROW(MAX_GRID_DIM_Z, 65535),
    ROW(MAX_SHARED_MEMORY_PER_BLOCK, 49152),
    ROW(MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, 232448),
    ROW(MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, 233472),
    ROW(RESERVED_SHARED_MEMORY_PER_BLOCK, 1024),
    ROW(TOTAL_CONSTANT_MEMORY, 65536),
    ROW(MAX_PITCH, 2147483647),
    ROW(MAX_REGISTERS_PER_BLOCK, 65536),
    ROW(MAX_REGISTERS_PER_MULTIPROCESSOR, 65536),
    ROW(L2_CACHE_SIZE, 50 << 20),
    ROW(MAX_PERSISTING_L2_CACHE_SIZE, 32 << 20),
    ROW(MAX_ACCESS_POLICY_WINDOW_SIZE, 128 << 20),
    ROW(GLOBAL_L1_CACHE_SUPPORTED, 1),
    ROW(LOCAL_L1_CACHE_SUPPORTED, 1),
    ROW(CLOCK_RATE, 1980000),
    ROW(MEMORY_CLOCK_RATE, 2619000),
    ROW(GLOBAL_MEMORY_BUS_WIDTH, 5120),
    ROW(SINGLE_TO_DOUBLE_PRECISION_PERF_RATIO, 2),
    ROW(TEXTURE_ALIGNMENT, 512),
    ROW(TEXTURE_PITCH_ALIGNMENT, 32),
    ROW(SURFACE_ALIGNMENT, 512),
    ROW(ASYNC_ENGINE_COUNT, 3),
    ROW(GPU_OVERLAP, 1),
    ROW(CONCURRENT_KERNELS, 1),
    ROW(COOPERATIVE_LAUNCH, 1),
    ROW(COMPUTE_PREEMPTION_SUPPORTED, 1),
    ROW(ECC_ENABLED, 1),
    // Streams.
    ROW(STREAM_PRIORITIES_SUPPORTED, 1),
    ROW(CAN_USE_64_BIT_STREAM_MEM_OPS, 1),
    ROW(CAN_USE_STREAM_WAIT_VALUE_NOR, 1),
    ROW(IPC_EVENT_SUPPORTED, 1),
    // Memory.
    ROW(UNIFIED_ADDRESSING, 1),
    ROW(CAN_MAP_HOST_MEMORY, 1),
    ROW(HOST_REGISTER_SUPPORTED, 1),
    ROW(CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM, 1),
    ROW(MANAGED_MEMORY, 1),
    ROW(CONCURRENT_MANAGED_ACCESS, 1),
    ROW(VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, 1),
    ROW(HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, 1),
    ROW(MEMORY_POOLS_SUPPORTED, 1),
};
#undef ROW
// clang-format on

bool is_of_virtual_memory(CUdevice_attribute attribute) {
  return attribute == CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED ||
         attribute == CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED;
}

}  // namespace

CUresult device_attribute(CUdevice device, CUdevice_attribute attribute, int* value) {
  if (attribute <= 0 || attribute >= CU_DEVICE_ATTRIBUTE_MAX) return CUDA_ERROR_INVALID_VALUE;
  *value = 0;
  if (attribute == CU_DEVICE_ATTRIBUTE_PCI_BUS_ID) *value = pci_bus(device);
  for (const Row& row : kRows) {
    if (row.attribute == attribute) *value = row.value;
  }
  if (is_of_virtual_memory(attribute) && !config().virtual_memory) *value = 0;
  return CUDA_SUCCESS;
}

}  // namespace spillover::emulator
