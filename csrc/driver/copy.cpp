#include "driver/copy.hpp"

#include "driver/check_result.hpp"
#include "driver/context.hpp"
#include "driver/stream.hpp"

namespace spillover {

void copy_to_host(void* target, DeviceAddress source, size_t size_bytes, const Stream& stream) {
  const ContextScope scope(stream.device());
  check(SPILLOVER_DRIVER_CALL(cuMemcpyDtoHAsync, target, static_cast<CUdeviceptr>(source),
                              size_bytes, static_cast<CUstream>(stream.handle())),
        "cuMemcpyDtoHAsync", size_bytes);
}

void copy_to_device(DeviceAddress target, const void* source, size_t size_bytes,
                    const Stream& stream) {
  const ContextScope scope(stream.device());
  check(SPILLOVER_DRIVER_CALL(cuMemcpyHtoDAsync, static_cast<CUdeviceptr>(target), source,
                              size_bytes, static_cast<CUstream>(stream.handle())),
        "cuMemcpyHtoDAsync", size_bytes);
}

}  // namespace spillover
