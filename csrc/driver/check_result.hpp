// From a CUresult to a typed error or a report. PRIVATE to driver/: it includes <cuda.h>.
//
// Thread-safe.
#pragma once

#include <cstddef>
#include <string>

#include "driver/function_table.hpp"

namespace spillover {

// "cuMemCreate failed: CUDA_ERROR_INVALID_VALUE (invalid argument)".
std::string describe_failure(const DriverFunctions& functions, const char* call, CUresult result);

// Throws DeviceOutOfMemoryError for CUDA_ERROR_OUT_OF_MEMORY and DriverError for every other
// failure. size_bytes, where it is not 0, is the size that the call asked for.
[[noreturn]] void throw_failure(CUresult result, const char* call, size_t size_bytes);

inline void check(CUresult result, const char* call, size_t size_bytes = 0) {
  if (result != CUDA_SUCCESS) [[unlikely]]
    throw_failure(result, call, size_bytes);
}

// For destructors: writes a failure to stderr. Silent where the driver is already shut down, since
// the process is ending and the driver has released everything.
void report_failure(CUresult result, const char* call) noexcept;

}  // namespace spillover

// Calls a driver function; a failure is thrown. The name is pasted here and not handed on to
// another macro, which would see the versioned name that <cuda.h> makes of it.
#define SPILLOVER_CHECKED_CALL(name, ...)                                                          \
  ::spillover::check(                                                                              \
      ::spillover::require_function(::spillover::driver_functions().p_##name, #name)(__VA_ARGS__), \
      #name)

// Calls a driver function from a destructor: never throws; a failure is reported. Nothing happens
// in a forked child, where the handle belongs to the parent.
#define SPILLOVER_RELEASE_CALL(name, ...)                                   \
  do {                                                                      \
    if (const auto* functions = ::spillover::driver_functions_if_usable();  \
        functions != nullptr && functions->p_##name != nullptr)             \
      ::spillover::report_failure(functions->p_##name(__VA_ARGS__), #name); \
  } while (false)
