#include "emulator/libcudart/runtime.hpp"

namespace runtime = spillover::emulator::runtime;
using runtime::device_pointer;
using runtime::with_context;

namespace {

enum class Wait { kNo, kYes };

// What the driver knows of one pointer. A pointer that it does not know is pageable host memory.
class Place {
 public:
  explicit Place(const void* pointer) {
    const CUdeviceptr address = device_pointer(pointer);
    look_up(CU_POINTER_ATTRIBUTE_MEMORY_TYPE, address, &type_);
    if (type_ == CU_MEMORYTYPE_DEVICE) {
      look_up(CU_POINTER_ATTRIBUTE_IS_MANAGED, address, &is_managed_);
    }
  }

  CUresult error() const { return error_; }
  // Device memory that the host cannot touch.
  bool is_device_only() const { return type_ == CU_MEMORYTYPE_DEVICE && is_managed_ == 0; }
  // Memory that a GPU can touch: its own, and host memory that is pinned.
  bool is_device_visible() const { return type_ != 0; }

 private:
  void look_up(CUpointer_attribute attribute, CUdeviceptr address, unsigned* value) {
    const CUresult result = cuPointerGetAttribute(value, attribute, address);
    if (result == CUDA_SUCCESS) return;
    *value = 0;
    if (result != CUDA_ERROR_INVALID_VALUE) error_ = result;
  }

  CUresult error_ = CUDA_SUCCESS;
  unsigned type_ = 0;
  unsigned is_managed_ = 0;
};

// Whether two pointers fit the direction that the caller names. With unified addressing CUDA finds
// the direction by itself and uses the name only to refuse what cannot be.
bool fits(cudaMemcpyKind kind, const Place& destination, const Place& source) {
  switch (kind) {
    case cudaMemcpyHostToHost:
      return !destination.is_device_only() && !source.is_device_only();
    case cudaMemcpyHostToDevice:
      return destination.is_device_visible() && !source.is_device_only();
    case cudaMemcpyDeviceToHost:
      return !destination.is_device_only() && source.is_device_visible();
    case cudaMemcpyDeviceToDevice:
      return destination.is_device_visible() && source.is_device_visible();
    default:
      return false;
  }
}

cudaError_t check_direction(cudaMemcpyKind kind, const void* destination, const void* source) {
  if (static_cast<unsigned int>(kind) > cudaMemcpyDefault) return cudaErrorInvalidMemcpyDirection;
  if (kind == cudaMemcpyDefault) return cudaSuccess;
  const Place to(destination);
  const Place from(source);
  for (const CUresult error : {to.error(), from.error()}) {
    if (error != CUDA_SUCCESS) return runtime::to_runtime(error);
  }
  return fits(kind, to, from) ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t copy(void* destination, const void* source, size_t count, cudaMemcpyKind kind,
                 cudaStream_t stream, Wait wait) {
  if (count == 0) return cudaSuccess;
  const cudaError_t error = check_direction(kind, destination, source);
  if (error != cudaSuccess) return error;
  const CUdeviceptr to = device_pointer(destination);
  const CUdeviceptr from = device_pointer(source);
  return runtime::to_runtime(wait == Wait::kYes ? cuMemcpy(to, from, count)
                                                : cuMemcpyAsync(to, from, count, stream));
}

// Rows of width bytes, which lie pitch bytes apart.
struct Rows {
  size_t destination_pitch;
  size_t source_pitch;
  size_t width;
  size_t height;
};

cudaError_t copy_rows(void* destination, const void* source, const Rows& rows, cudaMemcpyKind kind,
                      cudaStream_t stream, Wait wait) {
  if (rows.width > rows.destination_pitch || rows.width > rows.source_pitch) {
    return cudaErrorInvalidPitchValue;
  }
  if (rows.width == 0 || rows.height == 0) return cudaSuccess;
  const cudaError_t error = check_direction(kind, destination, source);
  if (error != cudaSuccess) return error;
  CUDA_MEMCPY2D parameters{};
  parameters.srcMemoryType = CU_MEMORYTYPE_UNIFIED;
  parameters.srcDevice = device_pointer(source);
  parameters.srcPitch = rows.source_pitch;
  parameters.dstMemoryType = CU_MEMORYTYPE_UNIFIED;
  parameters.dstDevice = device_pointer(destination);
  parameters.dstPitch = rows.destination_pitch;
  parameters.WidthInBytes = rows.width;
  parameters.Height = rows.height;
  return runtime::to_runtime(wait == Wait::kYes ? cuMemcpy2D(&parameters)
                                                : cuMemcpy2DAsync(&parameters, stream));
}

cudaError_t copy_between_devices(void* destination, int destination_device, const void* source,
                                 int source_device, size_t count, cudaStream_t stream, Wait wait) {
  CUcontext to = nullptr;
  CUcontext from = nullptr;
  CUresult result = runtime::primary_context(destination_device, &to);
  if (result == CUDA_SUCCESS) result = runtime::primary_context(source_device, &from);
  if (result != CUDA_SUCCESS) return runtime::to_runtime(result);
  if (count == 0) return cudaSuccess;
  const CUdeviceptr target = device_pointer(destination);
  const CUdeviceptr origin = device_pointer(source);
  return runtime::to_runtime(wait == Wait::kYes
                                 ? cuMemcpyPeer(target, to, origin, from, count)
                                 : cuMemcpyPeerAsync(target, to, origin, from, count, stream));
}

unsigned char byte_of(int value) {
  return static_cast<unsigned char>(value);
}

}  // namespace

extern "C" {

cudaError_t cudaMemcpy(void* destination, const void* source, size_t count, cudaMemcpyKind kind) {
  return with_context(__func__,
                      [=] { return copy(destination, source, count, kind, nullptr, Wait::kYes); });
}

cudaError_t cudaMemcpyAsync(void* destination, const void* source, size_t count,
                            cudaMemcpyKind kind, cudaStream_t stream) {
  return with_context(__func__,
                      [=] { return copy(destination, source, count, kind, stream, Wait::kNo); });
}

cudaError_t cudaMemcpy2D(void* destination, size_t destination_pitch, const void* source,
                         size_t source_pitch, size_t width, size_t height, cudaMemcpyKind kind) {
  return with_context(__func__, [=] {
    const Rows rows{destination_pitch, source_pitch, width, height};
    return copy_rows(destination, source, rows, kind, nullptr, Wait::kYes);
  });
}

cudaError_t cudaMemcpy2DAsync(void* destination, size_t destination_pitch, const void* source,
                              size_t source_pitch, size_t width, size_t height, cudaMemcpyKind kind,
                              cudaStream_t stream) {
  return with_context(__func__, [=] {
    const Rows rows{destination_pitch, source_pitch, width, height};
    return copy_rows(destination, source, rows, kind, stream, Wait::kNo);
  });
}

cudaError_t cudaMemcpyPeer(void* destination, int destination_device, const void* source,
                           int source_device, size_t count) {
  return with_context(__func__, [=] {
    return copy_between_devices(destination, destination_device, source, source_device, count,
                                nullptr, Wait::kYes);
  });
}

cudaError_t cudaMemcpyPeerAsync(void* destination, int destination_device, const void* source,
                                int source_device, size_t count, cudaStream_t stream) {
  return with_context(__func__, [=] {
    return copy_between_devices(destination, destination_device, source, source_device, count,
                                stream, Wait::kNo);
  });
}

cudaError_t cudaMemset(void* pointer, int value, size_t count) {
  return with_context(__func__, [=] {
    return count == 0 ? CUDA_SUCCESS : cuMemsetD8(device_pointer(pointer), byte_of(value), count);
  });
}

cudaError_t cudaMemsetAsync(void* pointer, int value, size_t count, cudaStream_t stream) {
  return with_context(__func__, [=] {
    return count == 0 ? CUDA_SUCCESS
                      : cuMemsetD8Async(device_pointer(pointer), byte_of(value), count, stream);
  });
}

cudaError_t cudaMemset2D(void* pointer, size_t pitch, int value, size_t width, size_t height) {
  return with_context(__func__, [=] {
    return width == 0 || height == 0
               ? CUDA_SUCCESS
               : cuMemsetD2D8(device_pointer(pointer), pitch, byte_of(value), width, height);
  });
}

cudaError_t cudaMemset2DAsync(void* pointer, size_t pitch, int value, size_t width, size_t height,
                              cudaStream_t stream) {
  return with_context(__func__, [=] {
    return width == 0 || height == 0 ? CUDA_SUCCESS
                                     : cuMemsetD2D8Async(device_pointer(pointer), pitch,
                                                         byte_of(value), width, height, stream);
  });
}

}  // extern "C"
