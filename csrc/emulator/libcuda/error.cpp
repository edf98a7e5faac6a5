// Errors and versions: the functions that need no device.
#include "emulator/core/hazard_checker.hpp"
#include "emulator/core/status.hpp"
#include "emulator/libcuda/api_call.hpp"

namespace emulator = spillover::emulator;

extern "C" {

CUresult cuGetErrorName(CUresult error, const char** text) {
  return emulator::plain(__func__, [=] {
    if (text == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *text = emulator::status_name(error);
    return *text == nullptr ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
  });
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  return emulator::plain(__func__, [=] {
    if (text == nullptr) return CUDA_ERROR_INVALID_VALUE;
    // A call that found a hazard fails with CUDA_ERROR_UNKNOWN; nothing else here does.
    const bool is_hazard = error == CUDA_ERROR_UNKNOWN && *emulator::last_hazard() != '\0';
    *text = is_hazard ? emulator::last_hazard() : emulator::status_text(error);
    return *text == nullptr ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
  });
}

CUresult cuDriverGetVersion(int* version) {
  return emulator::plain(__func__, [=] {
    if (version == nullptr) return CUDA_ERROR_INVALID_VALUE;
    *version = 13000;
    return CUDA_SUCCESS;
  });
}

CUresult cuInit(unsigned int flags) {
  return emulator::plain(__func__, [=] {
    if (emulator::process_state() == emulator::ProcessState::kForked) {
      return CUDA_ERROR_NOT_INITIALIZED;
    }
    return flags != 0 ? CUDA_ERROR_INVALID_VALUE : emulator::Machine::initialise();
  });
}

}  // extern "C"
