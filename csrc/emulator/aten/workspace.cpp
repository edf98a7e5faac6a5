#include "emulator/aten/workspace.hpp"

#include <c10/core/Allocator.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <torch/headeronly/version.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <tuple>
#include <utility>

// Torch's header for these (ATen/cuda/CUDAContextLight.h) includes those of cuBLAS, cuSPARSE and
// cuSOLVER, which need parts of the CUDA toolkit that no wheel brings along. The declarations are
// therefore repeated.
namespace at::cuda {

#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 13
using Workspace = at::DataPtr;
#else
using Workspace = std::pair<at::DataPtr, size_t>;
#endif

struct WorkspaceMapWithMutex {
  std::map<std::tuple<void*, void*>, Workspace> map;
  std::shared_mutex mutex;
};

WorkspaceMapWithMutex& cublas_handle_stream_to_workspace();
size_t getChosenWorkspaceSize();

}  // namespace at::cuda

namespace spillover::emulator {
namespace {

thread_local bool is_allocating = false;
thread_local bool is_allocating_optional = false;

class AllocationScope {
 public:
  explicit AllocationScope(bool is_optional) {
    is_allocating = true;
    is_allocating_optional = is_optional;
  }
  ~AllocationScope() { is_allocating = is_allocating_optional = false; }
  AllocationScope(const AllocationScope&) = delete;
  AllocationScope& operator=(const AllocationScope&) = delete;
};

bool workspaces_enabled() {
  static const bool enabled = [] {
    const char* value = std::getenv("SPILLOVER_EMULATOR_CUBLAS_WORKSPACE");
    return value == nullptr || std::strcmp(value, "0") != 0;
  }();
  return enabled;
}

// Torch keys its table by cuBLAS handle and stream. No handle exists here; one address a device
// stands for it, and is never dereferenced.
void* handle_of(c10::DeviceIndex device) {
  static std::array<char, C10_COMPILE_TIME_MAX_GPUS> handles;
  return &handles.at(static_cast<size_t>(device));
}

}  // namespace

at::DataPtr allocate_workspace(size_t size_bytes, bool is_optional) {
  const AllocationScope scope(is_optional);
  return c10::cuda::CUDACachingAllocator::get()->allocate(size_bytes);
}

void ensure_cublas_workspace(const c10::cuda::CUDAStream& stream) {
  if (!workspaces_enabled()) return;
  auto& table = at::cuda::cublas_handle_stream_to_workspace();
  const auto key =
      std::make_tuple(handle_of(stream.device_index()), static_cast<void*>(stream.stream()));
  {
    const std::shared_lock<std::shared_mutex> lock(table.mutex);
    if (table.map.find(key) != table.map.end()) return;
  }
  const size_t size_bytes = at::cuda::getChosenWorkspaceSize();
  at::DataPtr memory = allocate_workspace(size_bytes, /*is_optional=*/false);
  const std::unique_lock<std::shared_mutex> lock(table.mutex);
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 13
  table.map.emplace(key, std::move(memory));
#else
  table.map.emplace(key, at::cuda::Workspace(std::move(memory), size_bytes));
#endif
}

bool allocates_workspace() {
  return is_allocating;
}

bool allocates_optional_workspace() {
  return is_allocating_optional;
}

}  // namespace spillover::emulator
