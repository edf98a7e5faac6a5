#include "emulator/core/transfers.hpp"

#include <cstring>
#include <memory>
#include <utility>

#include "emulator/core/config.hpp"
#include "emulator/core/phantom.hpp"

namespace spillover::emulator {
namespace {

enum class Place { kDevice, kPinned, kPageable };

Place place_of(const Machine& machine, Address address, std::size_t size_bytes) {
  if (machine.addresses.contains(address)) return Place::kDevice;
  return machine.host_memory.covers(address, size_bytes) ? Place::kPinned : Place::kPageable;
}

bool is_legal(CopyKind kind, Place destination, Place source) {
  switch (kind) {
    case CopyKind::kAny:
      return true;
    case CopyKind::kHostToDevice:
      return destination != Place::kPageable && source != Place::kDevice;
    case CopyKind::kDeviceToHost:
      return source != Place::kPageable && destination != Place::kDevice;
    case CopyKind::kDeviceToDevice:
    case CopyKind::kPeer:
      return destination != Place::kPageable && source != Place::kPageable;
  }
  return false;
}

const char* name_of(CopyKind kind, Place destination, Place source) {
  if (kind == CopyKind::kPeer) return "memcpy peer";
  if (source == Place::kDevice) {
    return destination == Place::kDevice ? "memcpy device-to-device" : "memcpy device-to-host";
  }
  return destination == Place::kDevice ? "memcpy host-to-device" : "memcpy host-to-host";
}

Clock::Route route_of(Machine& machine, const Copy& copy, Place destination, Place source) {
  if (destination == Place::kDevice && source == Place::kDevice) {
    return machine.device_of(copy.destination) == machine.device_of(copy.source)
               ? Clock::Route::kDeviceToDevice
               : Clock::Route::kPeer;
  }
  if (destination == Place::kDevice) return Clock::Route::kToDevice;
  return source == Place::kDevice ? Clock::Route::kToHost : Clock::Route::kHostToHost;
}

bool check_live(Machine& machine, const char* name, Address address, std::size_t size_bytes,
                bool is_write) {
  if (machine.is_live(address, size_bytes, is_write)) return true;
  report("illegal address: %s of %zu bytes at 0x%zx by %s is not inside live device memory",
         is_write ? "write" : "read", size_bytes, address, name);
  return false;
}

// Rows that lie close together are one range; others are recorded one by one, so that what is
// between them stays free for others.
template <typename Function>
bool for_each_range(Address address, std::size_t pitch, std::size_t width_bytes, std::size_t height,
                    Function&& record) {
  if (height == 1 || pitch == width_bytes) return record(address, width_bytes * height);
  bool found = false;
  for (std::size_t row = 0; row < height; ++row) {
    found = record(address + row * pitch, width_bytes) || found;
  }
  return found;
}

bool record_rows(Machine& machine, const Stream& stream, Ticket ticket, const char* name,
                 AccessKind kind, Address address, std::size_t pitch, std::size_t width_bytes,
                 std::size_t height) {
  if (!machine.hazards.enabled()) return false;
  return for_each_range(address, pitch, width_bytes, height, [&](Address row, std::size_t bytes) {
    return machine.record_access(stream, ticket, name, kind, row, bytes);
  });
}

bool record_node_rows(Machine& machine, const Stream& stream, const Access& access, AccessKind kind,
                      Address address, std::size_t pitch, std::size_t width_bytes,
                      std::size_t height) {
  return for_each_range(address, pitch, width_bytes, height, [&](Address row, std::size_t bytes) {
    return machine.is_device_accessible(row, bytes) &&
           machine.record(access, stream.clock, kind, row, bytes, Recording::kYes);
  });
}

void stage(Copy* copy) {
  copy->staged = std::make_unique_for_overwrite<std::byte[]>(copy->width_bytes * copy->height);
  const auto* source = reinterpret_cast<const std::byte*>(copy->source);
  for (std::size_t row = 0; row < copy->height; ++row) {
    std::memcpy(copy->staged.get() + row * copy->width_bytes, source + row * copy->source_pitch,
                copy->width_bytes);
  }
}

// Queues what was prepared and, where the call blocks, waits for it.
CUresult finish(Machine& machine, Lock& lock, const StreamRef& stream, Operation operation,
                bool blocks, bool found_hazard) {
  machine.streams.submit(lock, stream, std::move(operation));
  if (blocks) machine.streams.synchronize(lock, stream);
  const CUresult hazard = machine.hazard_status(found_hazard);
  return hazard != CUDA_SUCCESS ? hazard : machine.sticky_error(stream->device);
}

}  // namespace

// No extent reaches beyond an address space; a larger product would wrap and pass for a small one.
static bool is_extent(std::size_t pitch, std::size_t height, std::size_t width_bytes) {
  constexpr std::size_t kExtentBytesMax = std::size_t{1} << 47U;
  return width_bytes <= kExtentBytesMax && height <= kExtentBytesMax &&
         (height <= 1 || pitch <= kExtentBytesMax / height);
}

// Rows begin at elements, and none begins inside of another. The pitch of one row is not used.
static bool has_room_for_rows(const Fill& fill) {
  return fill.height <= 1 ||
         (fill.pitch >= fill.width_bytes() && fill.pitch % fill.element_bytes == 0);
}

OperationCost cost_of(Machine& machine, const Copy& copy) {
  const Place destination = place_of(machine, copy.destination, copy.destination_bytes());
  const Place source = place_of(machine, copy.source, copy.source_bytes());
  const bool is_pageable = destination == Place::kPageable || source == Place::kPageable;
  return machine.clock.copy_cost(route_of(machine, copy, destination, source), is_pageable,
                                 copy.width_bytes * copy.height);
}

OperationCost cost_of(Machine& machine, const Fill& fill) {
  return machine.clock.bytes_bound_cost(fill.width_bytes() * fill.height);
}

CUresult check_copy(Machine& machine, const Copy& shape, CopyKind kind, const char** name) {
  if (shape.destination == 0 || shape.source == 0) return CUDA_ERROR_INVALID_VALUE;
  if (!is_extent(shape.destination_pitch, shape.height, shape.width_bytes) ||
      !is_extent(shape.source_pitch, shape.height, shape.width_bytes)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (shape.height > 1 &&
      (shape.destination_pitch < shape.width_bytes || shape.source_pitch < shape.width_bytes)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  const Place destination = place_of(machine, shape.destination, shape.destination_bytes());
  const Place source = place_of(machine, shape.source, shape.source_bytes());
  if (!is_legal(kind, destination, source)) return CUDA_ERROR_INVALID_VALUE;
  *name = name_of(kind, destination, source);
  const bool is_live =
      check_live(machine, *name, shape.destination, shape.destination_bytes(), true) &&
      check_live(machine, *name, shape.source, shape.source_bytes(), false);
  return is_live ? CUDA_SUCCESS : CUDA_ERROR_ILLEGAL_ADDRESS;
}

CUresult copy(Machine& machine, Lock& lock, const StreamRef& stream, Copy shape, CopyKind kind,
              CallVariant variant) {
  if (shape.width_bytes == 0 || shape.height == 0) return CUDA_SUCCESS;
  const char* name = nullptr;
  const CUresult valid = check_copy(machine, shape, kind, &name);
  if (valid != CUDA_SUCCESS) return valid;
  const Place destination = place_of(machine, shape.destination, shape.destination_bytes());
  const Place source = place_of(machine, shape.source, shape.source_bytes());
  if (stream->capture != nullptr) {
    if (machine.captures.follows_values()) stream->capture->capture->memory.apply(shape);
    machine.captures.add(stream, name, std::move(shape));
    return CUDA_SUCCESS;
  }
  const bool on_device = destination == Place::kDevice && source == Place::kDevice;
  const bool blocks =
      destination == Place::kPageable || (variant == CallVariant::kSync && !on_device);
  const bool is_pageable = source == Place::kPageable || destination == Place::kPageable;
  shape.is_source_dropped =
      machine.config.dry && source == Place::kPageable && !takes_phantom_source(machine, shape);
  if (source == Place::kPageable && !blocks && !shape.is_source_dropped) {
    lock.unlock();  // the bytes are the caller's own: nobody else needs to wait for this
    stage(&shape);
    lock.lock();
  }
  const Ticket ticket = machine.streams.prepare(stream);
  bool found = record_rows(machine, *stream, ticket, name, AccessKind::kRead, shape.source,
                           shape.source_pitch, shape.width_bytes, shape.height);
  found = record_rows(machine, *stream, ticket, name, AccessKind::kWrite, shape.destination,
                      shape.destination_pitch, shape.width_bytes, shape.height) ||
          found;
  Operation operation;
  operation.name = name;
  if (machine.clock.enabled()) operation.cost = cost_of(machine, shape);
  operation.body = std::move(shape);
  const CUresult result = finish(machine, lock, stream, std::move(operation), blocks, found);
  // A GPU's driver returns once the last bytes of pageable memory are on their way.
  if (machine.clock.enabled() && is_pageable && !blocks) machine.clock.wait(lock, stream, ticket);
  return result;
}

CUresult fill(Machine& machine, Lock& lock, const StreamRef& stream, const Fill& shape,
              CallVariant variant) {
  if (shape.width_elements == 0 || shape.height == 0) return CUDA_SUCCESS;
  if (shape.destination == 0 || shape.destination % shape.element_bytes != 0) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (!is_extent(shape.pitch, shape.height, shape.width_elements) || !has_room_for_rows(shape)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  const Place destination = place_of(machine, shape.destination, shape.destination_bytes());
  if (destination == Place::kPageable) return CUDA_ERROR_INVALID_VALUE;
  constexpr const char* kName = "memset";
  if (!check_live(machine, kName, shape.destination, shape.destination_bytes(), true)) {
    return CUDA_ERROR_ILLEGAL_ADDRESS;
  }
  // Unlike a copy, which the driver takes through the host where it must.
  if (machine.hazards.enabled() &&
      !machine.check_usable(*stream, kName, AccessKind::kWrite, shape.destination,
                            shape.destination_bytes())) {
    return machine.hazards.raises() ? CUDA_ERROR_UNKNOWN : CUDA_ERROR_ILLEGAL_ADDRESS;
  }
  if (stream->capture != nullptr) {
    if (machine.captures.follows_values()) stream->capture->capture->memory.apply(shape);
    machine.captures.add(stream, kName, shape);
    return CUDA_SUCCESS;
  }
  const bool blocks = variant == CallVariant::kSync && destination == Place::kPinned;
  const Ticket ticket = machine.streams.prepare(stream);
  const bool found = record_rows(machine, *stream, ticket, kName, AccessKind::kWrite,
                                 shape.destination, shape.pitch, shape.width_bytes(), shape.height);
  Operation operation;
  operation.name = kName;
  operation.body = shape;
  if (machine.clock.enabled()) operation.cost = cost_of(machine, shape);
  return finish(machine, lock, stream, std::move(operation), blocks, found);
}

bool record_copy(Machine& machine, const Stream& stream, Ticket ticket, const char* name,
                 const Copy& copy) {
  Access access = machine.access_of(stream, ticket, name);
  access.in_graph = true;
  const bool found = record_node_rows(machine, stream, access, AccessKind::kRead, copy.source,
                                      copy.source_pitch, copy.width_bytes, copy.height);
  return record_node_rows(machine, stream, access, AccessKind::kWrite, copy.destination,
                          copy.destination_pitch, copy.width_bytes, copy.height) ||
         found;
}

bool record_fill(Machine& machine, const Stream& stream, Ticket ticket, const char* name,
                 const Fill& fill) {
  Access access = machine.access_of(stream, ticket, name);
  access.in_graph = true;
  return record_node_rows(machine, stream, access, AccessKind::kWrite, fill.destination, fill.pitch,
                          fill.width_bytes(), fill.height);
}

CUresult check_copy_node(Machine& machine, const Copy& copy, const char** name) {
  if (copy.width_bytes == 0 || copy.height == 0 || copy.destination == 0 || copy.source == 0 ||
      !is_extent(copy.destination_pitch, copy.height, copy.width_bytes) ||
      !is_extent(copy.source_pitch, copy.height, copy.width_bytes) ||
      copy.destination_pitch < copy.width_bytes || copy.source_pitch < copy.width_bytes) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  *name = name_of(CopyKind::kAny, place_of(machine, copy.destination, copy.destination_bytes()),
                  place_of(machine, copy.source, copy.source_bytes()));
  return machine.is_live(copy.destination, copy.destination_bytes(), true) &&
                 machine.is_live(copy.source, copy.source_bytes(), false)
             ? CUDA_SUCCESS
             : CUDA_ERROR_INVALID_VALUE;
}

CUresult check_fill_node(Machine& machine, const Fill& fill) {
  const bool is_known =
      fill.element_bytes == 1 || fill.element_bytes == 2 || fill.element_bytes == 4;
  if (!is_known || fill.width_elements == 0 || fill.height == 0 || fill.destination == 0 ||
      fill.destination % fill.element_bytes != 0 ||
      !is_extent(fill.pitch, fill.height, fill.width_elements) || !has_room_for_rows(fill)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  const bool is_pageable =
      place_of(machine, fill.destination, fill.destination_bytes()) == Place::kPageable;
  return !is_pageable && machine.is_live(fill.destination, fill.destination_bytes(), true)
             ? CUDA_SUCCESS
             : CUDA_ERROR_INVALID_VALUE;
}

}  // namespace spillover::emulator
