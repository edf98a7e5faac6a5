// Asynchronous copies between pinned host memory and device memory.
//
// Stateless; any thread may call them. Both ranges stay valid until the stream has done the copy,
// and the stream's device is the one whose memory is copied. Throw DriverError.
#pragma once

#include <cstddef>

#include "driver/types.hpp"

namespace spillover {

class Stream;

void copy_to_host(void* target, DeviceAddress source, size_t size_bytes, const Stream& stream);
void copy_to_device(DeviceAddress target, const void* source, size_t size_bytes,
                    const Stream& stream);

}  // namespace spillover
