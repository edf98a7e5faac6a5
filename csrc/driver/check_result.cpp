#include "driver/check_result.hpp"

#include <cstdio>

#include "base/bytes.hpp"
#include "base/error.hpp"

namespace spillover {

std::string describe_failure(const DriverFunctions& functions, const char* call, CUresult result) {
  const char* name = nullptr;
  const char* text = nullptr;
  if (functions.p_cuGetErrorName != nullptr) functions.p_cuGetErrorName(result, &name);
  if (functions.p_cuGetErrorString != nullptr) functions.p_cuGetErrorString(result, &text);
  std::string message = std::string(call) + " failed: ";
  message += name != nullptr ? name : "CUresult " + std::to_string(static_cast<int>(result));
  if (text != nullptr) message += std::string(" (") + text + ")";
  return message;
}

void throw_failure(CUresult result, const char* call, size_t size_bytes) {
  const std::string subject =
      size_bytes == 0 ? call : std::string(call) + "(" + format_bytes(size_bytes) + ")";
  const std::string message = describe_failure(driver_functions(), subject.c_str(), result);
  if (result == CUDA_ERROR_OUT_OF_MEMORY) throw DeviceOutOfMemoryError(message, size_bytes);
  throw DriverError(message, static_cast<int>(result));
}

void report_failure(CUresult result, const char* call) noexcept {
  if (result == CUDA_SUCCESS || result == CUDA_ERROR_DEINITIALIZED) return;
  const char* name = nullptr;
  const DriverFunctions* functions = driver_functions_if_usable();
  if (functions != nullptr && functions->p_cuGetErrorName != nullptr)
    functions->p_cuGetErrorName(result, &name);
  std::fprintf(stderr, "spillover: %s failed while a handle was released: %s (CUresult %d)\n", call,
               name != nullptr ? name : "unknown error", static_cast<int>(result));
}

}  // namespace spillover
