// Asynchronous copies between pinned host memory and device memory.
//
// Stateless; any thread may call them. Both ranges stay valid until the stream has done the copy,
// and the stream's device is the one whose memory is copied. Throw DriverError.
#pragma once

#include <cstddef>
#include <span>

#include "driver/types.hpp"

namespace spillover {

class Stream;

void copy_to_host(void* target, DeviceAddress source, size_t size_bytes, const Stream& stream);
void copy_to_device(DeviceAddress target, const void* source, size_t size_bytes,
                    const Stream& stream);

// One of several copies in one direction. host is written to in a copy out only.
struct HostDeviceCopy {
  void* host;
  DeviceAddress device;
  size_t size_bytes;
};

// Many copies by one call where the driver has cuMemcpyBatchAsync as of CUDA 13.0, else by one call
// each; the stream may do them in any order. Where one throws, others may be on the stream.
void copy_to_host(std::span<const HostDeviceCopy> copies, const Stream& stream);
void copy_to_device(std::span<const HostDeviceCopy> copies, const Stream& stream);

}  // namespace spillover
