// Opaque names for CUDA's handles, so that other layers need no CUDA header.
//
// Values only. A handle that is passed around in these types is borrowed; the owners are the
// classes of this layer (Stream, Event, ...) or code outside of spillover, such as torch.
#pragma once

#include <cstdint>

namespace spillover {

// A CUstream. nullptr is the legacy default stream.
using StreamHandle = void*;

// A CUevent.
using EventHandle = void*;

// A CUdeviceptr. Never to be dereferenced by the host.
using DeviceAddress = uintptr_t;

}  // namespace spillover
