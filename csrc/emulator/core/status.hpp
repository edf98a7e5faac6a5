// Names and descriptions of every CUresult of CUDA 13. Stateless: any thread may call, also after a
// fork.
#pragma once

#include <cuda.h>

namespace spillover::emulator {

// "CUDA_ERROR_INVALID_VALUE"; nullptr for a number that CUDA does not define.
const char* status_name(CUresult status);

// "invalid argument"; nullptr for a number that CUDA does not define.
const char* status_text(CUresult status);

}  // namespace spillover::emulator
