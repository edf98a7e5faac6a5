#include "driver/pinned_region.hpp"

#include <sys/resource.h>
#include <unistd.h>

#include <cstdint>
#include <string>
#include <utility>

#include "base/bytes.hpp"
#include "base/error.hpp"
#include "driver/check_result.hpp"
#include "driver/context.hpp"
#include "driver/fork_guard.hpp"

namespace spillover {
namespace {

std::string locked_memory_limit() {
  rlimit limit{};
  if (getrlimit(RLIMIT_MEMLOCK, &limit) != 0) return "not known (ulimit -l)";
  if (limit.rlim_cur == RLIM_INFINITY) return "infinite (ulimit -l)";
  return format_bytes(limit.rlim_cur) + " (ulimit -l)";
}

}  // namespace

PinnedRegion::PinnedRegion(int device, void* address, size_t size_bytes)
    : device_(device), size_bytes_(size_bytes) {
  const auto page_bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  if (address == nullptr || size_bytes == 0 || size_bytes % page_bytes != 0 ||
      reinterpret_cast<uintptr_t>(address) % page_bytes != 0) {
    throw ConfigError("a pinned region must be whole pages of " + std::to_string(page_bytes) +
                      " bytes; got " + std::to_string(size_bytes) + " bytes");
  }
  const ContextScope scope(device);
  const CUresult result =
      SPILLOVER_DRIVER_CALL(cuMemHostRegister, address, size_bytes, CU_MEMHOSTREGISTER_PORTABLE);
  if (result == CUDA_ERROR_OUT_OF_MEMORY || result == CUDA_ERROR_NOT_PERMITTED) {
    throw HostOutOfMemoryError("the system refused to pin " + format_bytes(size_bytes) +
                                   " of host memory; lower the host budget, or raise the memory "
                                   "limit of this container or its locked-memory limit, which is " +
                                   locked_memory_limit(),
                               size_bytes);
  }
  check(result, "cuMemHostRegister", size_bytes);
  address_ = address;
}

PinnedRegion::~PinnedRegion() {
  release();
}

bool PinnedRegion::release() noexcept {
  if (address_ == nullptr || in_forked_child()) return true;
  const DriverFunctions* functions = driver_functions_if_usable();
  if (functions == nullptr) return true;  // The driver has shut down and released everything.
  void* const address = std::exchange(address_, nullptr);
  const ReleaseContextScope scope(device_);
  CUresult result = functions->p_cuMemHostUnregister(address);
  // The call may have done its work and returned an error of earlier work; the range is ours, so
  // asking again does no harm.
  if (result != CUDA_SUCCESS && result != CUDA_ERROR_DEINITIALIZED) {
    report_failure(result, "cuMemHostUnregister");
    result = functions->p_cuMemHostUnregister(address);
  }
  return result == CUDA_SUCCESS || result == CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED ||
         result == CUDA_ERROR_DEINITIALIZED;
}

PinnedRegion::PinnedRegion(PinnedRegion&& other) noexcept
    : device_(other.device_),
      address_(std::exchange(other.address_, nullptr)),
      size_bytes_(other.size_bytes_) {}

PinnedRegion& PinnedRegion::operator=(PinnedRegion&& other) noexcept {
  std::swap(device_, other.device_);
  std::swap(address_, other.address_);
  std::swap(size_bytes_, other.size_bytes_);
  return *this;
}

}  // namespace spillover
