// The CUDA driver's functions, found at run time. PRIVATE to driver/: it includes <cuda.h>.
//
// The table is filled at the first call, so that importing the package needs no driver: libcuda is
// opened by name and each function is asked for with cuGetProcAddress at the version whose
// interface this code was written for. A failed attempt is not remembered: the emulated driver may
// be loaded later. The library is never closed, as static destructors of others may still call into
// it.
//
// Thread-safe. driver_functions() throws DriverError without a driver, StateError in a forked
// child.
#pragma once

#include <cuda.h>

// X(name, introduced): the public name, and the CUDA version (1000 * major + 10 * minor) of the
// interface that <cuda.h> declares under that name. cuGetProcAddress picks the variant by version,
// so that number must match the header's: cuMemAlloc at 3020 is cuMemAlloc_v2.
#define SPILLOVER_DRIVER_FUNCTIONS(X)         \
  /* Errors and versions */                   \
  X(cuInit, 2000)                             \
  X(cuDriverGetVersion, 2020)                 \
  X(cuGetErrorName, 6000)                     \
  X(cuGetErrorString, 6000)                   \
  /* Devices and contexts */                  \
  X(cuDeviceGet, 2000)                        \
  X(cuDeviceGetCount, 2000)                   \
  X(cuDeviceGetAttribute, 2000)               \
  X(cuDeviceGetName, 2000)                    \
  X(cuDeviceTotalMem, 3020)                   \
  X(cuDevicePrimaryCtxRetain, 7000)           \
  X(cuDevicePrimaryCtxRelease, 11000)         \
  X(cuCtxGetCurrent, 4000)                    \
  X(cuCtxGetDevice, 2000)                     \
  X(cuCtxPushCurrent, 4000)                   \
  X(cuCtxPopCurrent, 4000)                    \
  X(cuCtxSynchronize, 2000)                   \
  /* Streams and events */                    \
  X(cuStreamCreateWithPriority, 5050)         \
  X(cuStreamDestroy, 4000)                    \
  X(cuStreamSynchronize, 2000)                \
  X(cuStreamQuery, 2000)                      \
  X(cuStreamWaitEvent, 3020)                  \
  X(cuStreamIsCapturing, 10000)               \
  X(cuStreamGetId, 12000)                     \
  X(cuStreamGetCtx, 9020)                     \
  X(cuStreamGetDevice, 12080)                 \
  X(cuStreamGetCaptureInfo, 12030)            \
  X(cuGraphNodeGetDependencies, 12030)        \
  X(cuThreadExchangeStreamCaptureMode, 10010) \
  X(cuEventCreate, 2000)                      \
  X(cuEventDestroy, 4000)                     \
  X(cuEventRecord, 2000)                      \
  X(cuEventQuery, 2000)                       \
  X(cuEventSynchronize, 2000)                 \
  /* Device memory */                         \
  X(cuMemGetInfo, 3020)                       \
  X(cuMemAlloc, 3020)                         \
  X(cuMemFree, 3020)                          \
  X(cuMemGetAddressRange, 3020)               \
  X(cuMemcpyDtoHAsync, 3020)                  \
  X(cuMemcpyHtoDAsync, 3020)                  \
  X(cuMemcpyBatchAsync, 13000)                \
  /* Virtual memory */                        \
  X(cuMemGetAllocationGranularity, 10020)     \
  X(cuMemAddressReserve, 10020)               \
  X(cuMemAddressFree, 10020)                  \
  X(cuMemCreate, 10020)                       \
  X(cuMemRelease, 10020)                      \
  X(cuMemMap, 10020)                          \
  X(cuMemUnmap, 10020)                        \
  X(cuMemSetAccess, 10020)                    \
  /* Memory of several processes */           \
  X(cuMemExportToShareableHandle, 10020)      \
  X(cuMemImportFromShareableHandle, 10020)    \
  X(cuIpcGetMemHandle, 4010)                  \
  X(cuIpcOpenMemHandle, 11000)                \
  X(cuIpcCloseMemHandle, 4010)                \
  /* Pinned host memory */                    \
  X(cuMemHostRegister, 6050)                  \
  X(cuMemHostUnregister, 4000)

namespace spillover {

// <cuda.h> maps many names to versioned ones by macros (cuMemFree to cuMemFree_v2). Token pasting
// keeps the public name for the member, while decltype sees the versioned declaration.
struct DriverFunctions {
#define SPILLOVER_DECLARE_DRIVER_FUNCTION(name, introduced) decltype(&::name) p_##name = nullptr;
  SPILLOVER_DRIVER_FUNCTIONS(SPILLOVER_DECLARE_DRIVER_FUNCTION)
#undef SPILLOVER_DECLARE_DRIVER_FUNCTION
};

// The filled table, after a successful cuInit. A function that this driver lacks is null.
const DriverFunctions& driver_functions();

// The same without throwing, for destructors: nullptr without a driver or in a forked child.
const DriverFunctions* driver_functions_if_usable() noexcept;

// Throws DriverError for a function that the installed driver does not have.
[[noreturn]] void throw_missing_function(const char* name);

template <class Function>
Function require_function(Function function, const char* name) {
  if (function == nullptr) throw_missing_function(name);
  return function;
}

}  // namespace spillover

// Calls a driver function and gives its CUresult; throws where there is none to call.
#define SPILLOVER_DRIVER_CALL(name, ...) \
  (::spillover::require_function(::spillover::driver_functions().p_##name, #name)(__VA_ARGS__))
