// Copies and memsets.
#include "emulator/core/transfers.hpp"

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "emulator/core/copy_batch.hpp"
#include "emulator/libcuda/api_call.hpp"

namespace emulator = spillover::emulator;
using emulator::Address;
using emulator::CallVariant;
using emulator::Context;
using emulator::Copy;
using emulator::CopyKind;
using emulator::Fill;
using emulator::Lock;
using emulator::Machine;
using emulator::StreamRef;
using emulator::with_context;

namespace {

Copy one_row(Address destination, Address source, std::size_t size_bytes) {
  return {destination, size_bytes, source, size_bytes, size_bytes, 1, nullptr};
}

Address address_of(const void* pointer) {
  return reinterpret_cast<Address>(pointer);
}

CUresult copy_on(const char* name, CUstream handle, Copy shape, CopyKind kind,
                 CallVariant variant) {
  return with_context(name, [&](Machine& machine, Lock& lock, Context&) {
    StreamRef stream;
    const CUresult found = machine.streams.find(handle, &stream);
    if (found != CUDA_SUCCESS) return found;
    CUresult admitted = machine.captures.admit_work(stream);
    // A call that waits, on whichever stream, is none that a capture allows.
    if (admitted == CUDA_SUCCESS && variant == CallVariant::kSync) {
      admitted = machine.captures.admit_wait(stream);
    }
    if (admitted != CUDA_SUCCESS) return admitted;
    return emulator::copy(machine, lock, stream, std::move(shape), kind, variant);
  });
}

CUresult copy_sync(const char* name, Address destination, Address source, std::size_t size_bytes,
                   CopyKind kind) {
  return copy_on(name, nullptr, one_row(destination, source, size_bytes), kind, CallVariant::kSync);
}

CUresult copy_async(const char* name, Address destination, Address source, std::size_t size_bytes,
                    CopyKind kind, CUstream stream) {
  return copy_on(name, stream, one_row(destination, source, size_bytes), kind, CallVariant::kAsync);
}

// The address of a 2D copy's first byte on one side; 0 for what is not emulated (arrays).
Address side_of(CUmemorytype type, const void* host, CUdeviceptr device, std::size_t x_bytes,
                std::size_t y, std::size_t pitch) {
  const Address base = type == CU_MEMORYTYPE_HOST ? address_of(host)
                       : type == CU_MEMORYTYPE_DEVICE || type == CU_MEMORYTYPE_UNIFIED ? device
                                                                                       : 0;
  return base == 0 ? 0 : base + y * pitch + x_bytes;
}

CUresult copy_2d(const char* name, const CUDA_MEMCPY2D* request, CUstream stream,
                 CallVariant variant) {
  if (request == nullptr) return emulator::finish_call(name, CUDA_ERROR_INVALID_VALUE);
  if (request->srcMemoryType == CU_MEMORYTYPE_ARRAY ||
      request->dstMemoryType == CU_MEMORYTYPE_ARRAY) {
    return emulator::finish_call(name, CUDA_ERROR_NOT_SUPPORTED);
  }
  // A pitch of 0 means rows without gaps.
  const std::size_t width = request->WidthInBytes;
  const std::size_t source_pitch = request->srcPitch != 0 ? request->srcPitch : width;
  const std::size_t destination_pitch = request->dstPitch != 0 ? request->dstPitch : width;
  Copy shape;
  shape.destination = side_of(request->dstMemoryType, request->dstHost, request->dstDevice,
                              request->dstXInBytes, request->dstY, destination_pitch);
  shape.destination_pitch = destination_pitch;
  shape.source = side_of(request->srcMemoryType, request->srcHost, request->srcDevice,
                         request->srcXInBytes, request->srcY, source_pitch);
  shape.source_pitch = source_pitch;
  shape.width_bytes = width;
  shape.height = request->Height;
  return copy_on(name, stream, std::move(shape), CopyKind::kAny, variant);
}

CUresult fill_on(const char* name, CUstream handle, const Fill& shape, CallVariant variant) {
  return with_context(name, [&](Machine& machine, Lock& lock, Context&) {
    StreamRef stream;
    const CUresult found = machine.streams.find(handle, &stream);
    if (found != CUDA_SUCCESS) return found;
    const CUresult admitted = machine.captures.admit_work(stream);
    if (admitted != CUDA_SUCCESS) return admitted;
    return emulator::fill(machine, lock, stream, shape, variant);
  });
}

Fill fill_row(CUdeviceptr destination, std::uint32_t value, unsigned element_bytes,
              std::size_t count) {
  return {destination, count * element_bytes, count, 1, value, element_bytes};
}

Fill fill_rows(CUdeviceptr destination, std::size_t pitch, std::uint32_t value,
               unsigned element_bytes, std::size_t width, std::size_t height) {
  return {destination, pitch, width, height, value, element_bytes};
}

constexpr auto kSync = CallVariant::kSync;
constexpr auto kAsync = CallVariant::kAsync;

// One side of a copy between contexts. Addresses are unified, so the context says nothing that the
// address does not; but it must be that of the address.
struct PeerSide {
  Address address;
  CUcontext context;

  CUresult check(Machine& machine) const {
    const Context* found = machine.contexts.find(context);
    if (found == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
    const std::optional<int> device = machine.device_of(address);
    return device && *device != found->device ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
  }
};

CUresult copy_peer(const char* name, const PeerSide& destination, const PeerSide& source,
                   std::size_t size_bytes, CUstream handle, CallVariant variant) {
  return with_context(name, [&](Machine& machine, Lock& lock, Context&) {
    for (const PeerSide& side : {destination, source}) {
      const CUresult valid = side.check(machine);
      if (valid != CUDA_SUCCESS) return valid;
    }
    StreamRef stream;
    const CUresult found = machine.streams.find(handle, &stream);
    if (found != CUDA_SUCCESS) return found;
    return emulator::copy(machine, lock, stream,
                          one_row(destination.address, source.address, size_bytes), CopyKind::kPeer,
                          variant);
  });
}

// The copies of one call; the last attributes go to the end.
struct Batch {
  const CUdeviceptr* destinations;
  const CUdeviceptr* sources;
  const std::size_t* sizes;
  std::size_t count;
  const CUmemcpyAttributes* attributes;
  const std::size_t* first_copies;
  std::size_t attribute_count;

  bool is_valid() const {
    if (count == 0 || destinations == nullptr || sources == nullptr || sizes == nullptr ||
        attributes == nullptr || first_copies == nullptr || attribute_count == 0 ||
        attribute_count > count || first_copies[0] != 0) {
      return false;
    }
    for (std::size_t i = 0; i < attribute_count; ++i) {
      if (i > 0 && first_copies[i] <= first_copies[i - 1]) return false;
      const unsigned order = attributes[i].srcAccessOrder;
      if (first_copies[i] >= count || order < CU_MEMCPY_SRC_ACCESS_ORDER_STREAM ||
          order > CU_MEMCPY_SRC_ACCESS_ORDER_ANY ||
          attributes[i].flags > CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE) {
        return false;
      }
    }
    return true;
  }

  // Sources are read in the stream's order whatever is allowed; so who may take the memory back at
  // the call's end waits for the stream.
  bool is_read_at_once() const {
    for (std::size_t i = 0; i < attribute_count; ++i) {
      if (attributes[i].srcAccessOrder == CU_MEMCPY_SRC_ACCESS_ORDER_DURING_API_CALL) return true;
    }
    return false;
  }
};

// Copies of a batch have no order: the last one is the first here, so that a program which needs an
// order does not get the one that it may have thought of, and the checker reports that it needs
// one. All are looked at before the first is queued. failed is where the older version of the call
// puts the copy that could not be made.
CUresult copy_batch(const char* name, const Batch& batch, std::size_t* failed, CUstream handle) {
  return with_context(name, [&](Machine& machine, Lock& lock, Context&) {
    if (failed != nullptr) *failed = SIZE_MAX;
    const bool is_legacy = handle == CU_STREAM_LEGACY ||
                           (handle == nullptr && !emulator::default_stream_is_per_thread());
    if (is_legacy || !batch.is_valid()) return CUDA_ERROR_INVALID_VALUE;
    StreamRef stream;
    const CUresult found = machine.streams.find(handle, &stream);
    if (found != CUDA_SUCCESS) return found;
    const CUresult admitted = machine.captures.admit_work(stream);
    if (admitted != CUDA_SUCCESS) return admitted;
    std::vector<Copy> copies;
    copies.reserve(batch.count);
    for (std::size_t i = 0; i < batch.count; ++i) {
      copies.push_back(one_row(batch.destinations[i], batch.sources[i], batch.sizes[i]));
      const char* kind = nullptr;
      const CUresult valid =
          batch.sizes[i] == 0 ? CUDA_SUCCESS
                              : emulator::check_copy(machine, copies.back(), CopyKind::kAny, &kind);
      if (valid == CUDA_SUCCESS) continue;
      if (failed != nullptr) *failed = i;
      return valid;
    }
    if (emulator::check_independent(machine, *stream, name, copies)) {
      const CUresult hazard = machine.hazard_status(true);
      if (hazard != CUDA_SUCCESS) return hazard;
    }
    for (std::size_t i = batch.count; i-- > 0;) {
      const CUresult result =
          emulator::copy(machine, lock, stream, std::move(copies[i]), CopyKind::kAny, kAsync);
      if (result == CUDA_SUCCESS) continue;
      if (failed != nullptr) *failed = i;
      return result;
    }
    if (batch.is_read_at_once()) machine.streams.synchronize(lock, stream);
    return CUDA_SUCCESS;
  });
}

}  // namespace

extern "C" {

// The version of CUDA 12.8, which cuda.h declares for its own implementation only.
#undef cuMemcpyBatchAsync
CUresult cuMemcpyBatchAsync(CUdeviceptr* destinations, CUdeviceptr* sources, std::size_t* sizes,
                            std::size_t count, CUmemcpyAttributes* attributes,
                            std::size_t* first_copies, std::size_t attribute_count,
                            std::size_t* failed, CUstream stream) {
  return copy_batch(
      __func__, {destinations, sources, sizes, count, attributes, first_copies, attribute_count},
      failed, stream);
}

CUresult cuMemcpyBatchAsync_v2(CUdeviceptr* destinations, CUdeviceptr* sources, std::size_t* sizes,
                               std::size_t count, CUmemcpyAttributes* attributes,
                               std::size_t* first_copies, std::size_t attribute_count,
                               CUstream stream) {
  return copy_batch(
      __func__, {destinations, sources, sizes, count, attributes, first_copies, attribute_count},
      nullptr, stream);
}

CUresult cuMemcpy(CUdeviceptr destination, CUdeviceptr source, std::size_t size_bytes) {
  return copy_sync(__func__, destination, source, size_bytes, CopyKind::kAny);
}

CUresult cuMemcpyAsync(CUdeviceptr destination, CUdeviceptr source, std::size_t size_bytes,
                       CUstream stream) {
  return copy_async(__func__, destination, source, size_bytes, CopyKind::kAny, stream);
}

CUresult cuMemcpyHtoD(CUdeviceptr destination, const void* source, std::size_t size_bytes) {
  return copy_sync(__func__, destination, address_of(source), size_bytes, CopyKind::kHostToDevice);
}

CUresult cuMemcpyHtoDAsync(CUdeviceptr destination, const void* source, std::size_t size_bytes,
                           CUstream stream) {
  return copy_async(__func__, destination, address_of(source), size_bytes, CopyKind::kHostToDevice,
                    stream);
}

CUresult cuMemcpyDtoH(void* destination, CUdeviceptr source, std::size_t size_bytes) {
  return copy_sync(__func__, address_of(destination), source, size_bytes, CopyKind::kDeviceToHost);
}

CUresult cuMemcpyDtoHAsync(void* destination, CUdeviceptr source, std::size_t size_bytes,
                           CUstream stream) {
  return copy_async(__func__, address_of(destination), source, size_bytes, CopyKind::kDeviceToHost,
                    stream);
}

CUresult cuMemcpyDtoD(CUdeviceptr destination, CUdeviceptr source, std::size_t size_bytes) {
  return copy_sync(__func__, destination, source, size_bytes, CopyKind::kDeviceToDevice);
}

CUresult cuMemcpyDtoDAsync(CUdeviceptr destination, CUdeviceptr source, std::size_t size_bytes,
                           CUstream stream) {
  return copy_async(__func__, destination, source, size_bytes, CopyKind::kDeviceToDevice, stream);
}

CUresult cuMemcpyPeer(CUdeviceptr destination, CUcontext destination_context, CUdeviceptr source,
                      CUcontext source_context, std::size_t size_bytes) {
  return copy_peer(__func__, {destination, destination_context}, {source, source_context},
                   size_bytes, nullptr, kSync);
}

CUresult cuMemcpyPeerAsync(CUdeviceptr destination, CUcontext destination_context,
                           CUdeviceptr source, CUcontext source_context, std::size_t size_bytes,
                           CUstream stream) {
  return copy_peer(__func__, {destination, destination_context}, {source, source_context},
                   size_bytes, stream, kAsync);
}

CUresult cuMemcpy2D(const CUDA_MEMCPY2D* request) {
  return copy_2d(__func__, request, nullptr, kSync);
}

CUresult cuMemcpy2DUnaligned(const CUDA_MEMCPY2D* request) {
  return copy_2d(__func__, request, nullptr, kSync);
}

CUresult cuMemcpy2DAsync(const CUDA_MEMCPY2D* request, CUstream stream) {
  return copy_2d(__func__, request, stream, kAsync);
}

CUresult cuMemsetD8(CUdeviceptr destination, unsigned char value, std::size_t count) {
  return fill_on(__func__, nullptr, fill_row(destination, value, 1, count), kSync);
}

CUresult cuMemsetD16(CUdeviceptr destination, unsigned short value, std::size_t count) {
  return fill_on(__func__, nullptr, fill_row(destination, value, 2, count), kSync);
}

CUresult cuMemsetD32(CUdeviceptr destination, unsigned int value, std::size_t count) {
  return fill_on(__func__, nullptr, fill_row(destination, value, 4, count), kSync);
}

CUresult cuMemsetD8Async(CUdeviceptr destination, unsigned char value, std::size_t count,
                         CUstream stream) {
  return fill_on(__func__, stream, fill_row(destination, value, 1, count), kAsync);
}

CUresult cuMemsetD16Async(CUdeviceptr destination, unsigned short value, std::size_t count,
                          CUstream stream) {
  return fill_on(__func__, stream, fill_row(destination, value, 2, count), kAsync);
}

CUresult cuMemsetD32Async(CUdeviceptr destination, unsigned int value, std::size_t count,
                          CUstream stream) {
  return fill_on(__func__, stream, fill_row(destination, value, 4, count), kAsync);
}

CUresult cuMemsetD2D8(CUdeviceptr destination, std::size_t pitch, unsigned char value,
                      std::size_t width, std::size_t height) {
  return fill_on(__func__, nullptr, fill_rows(destination, pitch, value, 1, width, height), kSync);
}

CUresult cuMemsetD2D16(CUdeviceptr destination, std::size_t pitch, unsigned short value,
                       std::size_t width, std::size_t height) {
  return fill_on(__func__, nullptr, fill_rows(destination, pitch, value, 2, width, height), kSync);
}

CUresult cuMemsetD2D32(CUdeviceptr destination, std::size_t pitch, unsigned int value,
                       std::size_t width, std::size_t height) {
  return fill_on(__func__, nullptr, fill_rows(destination, pitch, value, 4, width, height), kSync);
}

CUresult cuMemsetD2D8Async(CUdeviceptr destination, std::size_t pitch, unsigned char value,
                           std::size_t width, std::size_t height, CUstream stream) {
  return fill_on(__func__, stream, fill_rows(destination, pitch, value, 1, width, height), kAsync);
}

CUresult cuMemsetD2D16Async(CUdeviceptr destination, std::size_t pitch, unsigned short value,
                            std::size_t width, std::size_t height, CUstream stream) {
  return fill_on(__func__, stream, fill_rows(destination, pitch, value, 2, width, height), kAsync);
}

CUresult cuMemsetD2D32Async(CUdeviceptr destination, std::size_t pitch, unsigned int value,
                            std::size_t width, std::size_t height, CUstream stream) {
  return fill_on(__func__, stream, fill_rows(destination, pitch, value, 4, width, height), kAsync);
}

}  // extern "C"
