// Memory for kernels' own use, from torch's allocator, and the workspaces that torch gives to
// cuBLAS. On a GPU the first matrix product on a stream
// allocates one (32 MiB on Hopper) from the caching allocator and keeps it, so memory statistics
// contain it; the emulated device has no cuBLAS and allocates the same memory for the same reason.
// Any thread may call.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/cuda/CUDAStream.h>

namespace spillover::emulator {

// Makes sure that the stream has its workspace. It is kept in torch's own table, so
// torch._C._cuda_clearCublasWorkspaces() frees it, and CUBLAS_WORKSPACE_CONFIG sets its size.
// SPILLOVER_EMULATOR_CUBLAS_WORKSPACE=0 switches workspaces off.
void ensure_cublas_workspace(const c10::cuda::CUDAStream& stream);

// On the current stream of the current device. The kernel does without an optional one where there
// is no room.
at::DataPtr allocate_workspace(size_t size_bytes, bool is_optional);

// Whether the calling thread is allocating one just now.
bool allocates_workspace();
bool allocates_optional_workspace();

}  // namespace spillover::emulator
