// What torch's allocator interface asks for and the pool does not have: checkpoints of private
// pools and sharing memory with other processes.
#include <c10/util/Exception.h>

#include "torch_adapter/allocator.hpp"

namespace spillover::torch_adapter {
namespace {

[[noreturn]] void not_supported(const char* what) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, "spillover's allocator does not support ", what,
      "; run without spillover.allocator.install(), or set SPILLOVER=0, to use it");
  std::abort();  // Not reached: the check always throws; it tells the compiler so.
}

constexpr const char* kSharing = "sharing CUDA tensors with other processes (CUDA IPC)";

}  // namespace

cuda_allocator::ShareableHandle Allocator::shareIpcHandle(void* pointer) {
  not_supported(kSharing);
}

std::shared_ptr<void> Allocator::getIpcDevPtr(std::string handle) {
  not_supported(kSharing);
}

}  // namespace spillover::torch_adapter
