#include "bindings/disk_requests.hpp"

#include <cstdint>

#include "base/error.hpp"
#include "driver/event.hpp"

namespace py = pybind11;

namespace spillover {

py::buffer_info contiguous_memory(const py::buffer& buffer, bool writable) {
  py::buffer_info info = buffer.request(writable);
  py::ssize_t stride = info.itemsize;
  for (py::ssize_t axis = info.ndim - 1; axis >= 0; --axis) {
    const auto index = static_cast<size_t>(axis);
    if (info.shape[index] != 1 && info.strides[index] != stride) {
      throw ConfigError("only contiguous buffers can be read and written");
    }
    stride *= info.shape[index];
  }
  return info;
}

size_t size_of(const py::buffer_info& info) {
  return static_cast<size_t>(info.size) * static_cast<size_t>(info.itemsize);
}

WriteGate gate_for(const py::object& after) {
  if (after.is_none()) return nullptr;
  if (WriteGate gate = gate_for_transfer(after)) return gate;
  if (!py::hasattr(after, "cuda_event")) {
    throw ConfigError("after= is a torch.cuda.Event or a ticket of a transfer engine");
  }
  const auto handle = after.attr("cuda_event").cast<uintptr_t>();
  const int device = after.attr("device").attr("index").cast<int>();
  return [handle, device] { synchronize_event(device, reinterpret_cast<EventHandle>(handle)); };
}

DiskEngineKind engine_named(const std::string& name) {
  if (name == "auto") return DiskEngineKind::kAuto;
  if (name == "io_uring") return DiskEngineKind::kIoUring;
  if (name == "threads") return DiskEngineKind::kThreads;
  throw ConfigError("engine='" + name + "' is not known; choose auto, io_uring or threads");
}

const char* name_of(DiskEngineKind engine) {
  return engine == DiskEngineKind::kIoUring ? "io_uring" : "threads";
}

}  // namespace spillover
