// The part of NVIDIA's cuFile that we call, as its cufile.h declares it: that header comes with
// CUDA's headers, and only drivers' layers see those. A test compiles both and compares.
//
// Values only. PRIVATE to tiers/.
#pragma once

#include <sys/types.h>

#include <cstddef>

namespace spillover::cufile {

struct Status {
  int code;         // A CUfileOpError; 0 for success.
  int driver_code;  // A CUresult, where code says that it is the driver's.
};

using Handle = void*;

inline constexpr int kOpaqueDescriptor = 1;  // CU_FILE_HANDLE_TYPE_OPAQUE_FD

struct Descriptor {
  int type = kOpaqueDescriptor;
  union {
    int descriptor;
    void* handle;
  } file{};
  const void* operations = nullptr;
};

// CUFileBoolConfigParameter_t
inline constexpr int kAllowCompatMode = 1;
inline constexpr int kForceCompatMode = 2;

inline constexpr int kCudaDriverError = 5011;

// 1000 * major + 10 * minor, as cuFileGetVersion says it. From this one on a program can forbid the
// compatibility mode.
inline constexpr int kVersionMin = 1140;

// X(name, symbol, result, arguments)
#define SPILLOVER_CUFILE_FUNCTIONS(X)                                         \
  X(get_version, "cuFileGetVersion", Status, (int*))                          \
  X(set_bool, "cuFileSetParameterBool", Status, (int, bool))                  \
  X(get_bool, "cuFileGetParameterBool", Status, (int, bool*))                 \
  X(open_driver, "cuFileDriverOpen", Status, ())                              \
  X(close_driver, "cuFileDriverClose_v2", Status, ())                         \
  X(register_file, "cuFileHandleRegister", Status, (Handle*, Descriptor*))    \
  X(unregister_file, "cuFileHandleDeregister", void, (Handle))                \
  X(register_memory, "cuFileBufRegister", Status, (const void*, size_t, int)) \
  X(unregister_memory, "cuFileBufDeregister", Status, (const void*))          \
  X(read, "cuFileRead", ssize_t, (Handle, void*, size_t, off_t, off_t))       \
  X(write, "cuFileWrite", ssize_t, (Handle, const void*, size_t, off_t, off_t))

struct Functions {
#define SPILLOVER_DECLARE(name, symbol, result, arguments) result(*name) arguments = nullptr;
  SPILLOVER_CUFILE_FUNCTIONS(SPILLOVER_DECLARE)
#undef SPILLOVER_DECLARE
};

}  // namespace spillover::cufile
