#include "driver/copy.hpp"

#include <vector>

#include "driver/check_result.hpp"
#include "driver/context.hpp"
#include "driver/stream.hpp"

namespace spillover {
namespace {

enum class Direction { kToHost, kToDevice };

void copy_batch(std::span<const HostDeviceCopy> copies, Direction direction, const Stream& stream) {
  const size_t count = copies.size();
  std::vector<CUdeviceptr> targets(count);
  std::vector<CUdeviceptr> sources(count);
  std::vector<size_t> sizes(count);
  size_t total_bytes = 0;
  for (size_t i = 0; i < count; ++i) {
    const auto device = static_cast<CUdeviceptr>(copies[i].device);
    const auto host = reinterpret_cast<CUdeviceptr>(copies[i].host);  // Addresses are unified.
    targets[i] = direction == Direction::kToHost ? host : device;
    sources[i] = direction == Direction::kToHost ? device : host;
    sizes[i] = copies[i].size_bytes;
    total_bytes += sizes[i];
  }
  CUmemcpyAttributes attributes{};
  attributes.srcAccessOrder = CU_MEMCPY_SRC_ACCESS_ORDER_STREAM;
  size_t first = 0;  // The attributes are those of all copies from this one on.
  const ContextScope scope(stream.device());
  check(
      SPILLOVER_DRIVER_CALL(cuMemcpyBatchAsync, targets.data(), sources.data(), sizes.data(), count,
                            &attributes, &first, 1, static_cast<CUstream>(stream.handle())),
      "cuMemcpyBatchAsync", total_bytes);
}

}  // namespace

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

void copy_to_host(std::span<const HostDeviceCopy> copies, const Stream& stream) {
  if (copies.size() > 1 && driver_functions().p_cuMemcpyBatchAsync != nullptr)
    return copy_batch(copies, Direction::kToHost, stream);
  for (const HostDeviceCopy& copy : copies)
    copy_to_host(copy.host, copy.device, copy.size_bytes, stream);
}

void copy_to_device(std::span<const HostDeviceCopy> copies, const Stream& stream) {
  if (copies.size() > 1 && driver_functions().p_cuMemcpyBatchAsync != nullptr)
    return copy_batch(copies, Direction::kToDevice, stream);
  for (const HostDeviceCopy& copy : copies)
    copy_to_device(copy.device, copy.host, copy.size_bytes, stream);
}

}  // namespace spillover
