// What a program that compiles kernels as it runs (NVRTC, fusers) is linked to. The functions have
// to exist, or such a program's library cannot be loaded at all; machine code cannot run here, so
// linking it fails with a sentence on stderr, and the rest behaves as for any kernel (module.cpp).
#include <unistd.h>

#include <algorithm>
#include <atomic>

#include "emulator/core/config.hpp"
#include "emulator/core/kernels.hpp"
#include "emulator/libcuda/api_call.hpp"

namespace emulator = spillover::emulator;
using emulator::Lock;
using emulator::Machine;
using emulator::with_driver;

namespace {

CUresult not_emulated(const char* name, std::atomic<bool>& reported) {
  return with_driver(name, [&](Machine&, Lock&) {
    if (!reported.exchange(true)) {
      emulator::report("%s is not emulated: a GPU's machine code cannot run here", name);
    }
    return CUDA_ERROR_NOT_SUPPORTED;
  });
}

constexpr int kThreadsPerMultiprocessor = 2048;
constexpr int kBlocksPerMultiprocessor = 32;

}  // namespace

extern "C" {

CUresult cuModuleLoad(CUmodule* module, const char* path) {
  if (path != nullptr && access(path, R_OK) != 0) {
    return emulator::finish_call(__func__, CUDA_ERROR_FILE_NOT_FOUND);
  }
  return cuModuleLoadData(module, path);
}

CUresult cuLinkCreate(unsigned int, CUjit_option*, void**, CUlinkState*) {
  static std::atomic<bool> reported{false};
  return not_emulated(__func__, reported);
}

CUresult cuLinkAddData(CUlinkState, CUjitInputType, void*, size_t, const char*, unsigned int,
                       CUjit_option*, void**) {
  static std::atomic<bool> reported{false};
  return not_emulated(__func__, reported);
}

CUresult cuLinkComplete(CUlinkState, void**, size_t*) {
  static std::atomic<bool> reported{false};
  return not_emulated(__func__, reported);
}

CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  static std::atomic<bool> reported{false};
  return not_emulated(__func__, reported);
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
  return with_driver(__func__, [=](Machine& machine, Lock&) {
    const bool is_valid =
        machine.kernels.check(function) != nullptr && emulator::is_cache_config(config);
    return is_valid ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
  });
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction function,
                                                     int block_threads, size_t) {
  return with_driver(__func__, [=](Machine& machine, Lock&) {
    if (blocks == nullptr || block_threads <= 0) return CUDA_ERROR_INVALID_VALUE;
    if (machine.kernels.check(function) == nullptr) return CUDA_ERROR_INVALID_HANDLE;
    *blocks = std::min(kThreadsPerMultiprocessor / block_threads, kBlocksPerMultiprocessor);
    return CUDA_SUCCESS;
  });
}

// A body does the work of the whole grid, so a cooperative launch is a launch.
CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned int grid_x, unsigned int grid_y,
                                   unsigned int grid_z, unsigned int block_x, unsigned int block_y,
                                   unsigned int block_z, unsigned int shared_bytes, CUstream stream,
                                   void** parameters) {
  return cuLaunchKernel(function, grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes,
                        stream, parameters, nullptr);
}

}  // extern "C"
