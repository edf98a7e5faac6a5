#include "emulator/libcuda/api_call.hpp"

#include "emulator/core/config.hpp"
#include "emulator/core/status.hpp"

namespace spillover::emulator {

CUresult finish_call(const char* name, CUresult result) {
  if (result == CUDA_SUCCESS || result == CUDA_ERROR_NOT_READY) return result;
  if (!process_ready() || !config().verbose) return result;
  const char* error = status_name(result);
  report("%s returned %s", name, error == nullptr ? "an unknown error" : error);
  return result;
}

}  // namespace spillover::emulator
