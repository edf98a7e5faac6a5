// Python's view of the driver layer: is there a driver, which one, what devices.
#include "bindings/bindings.hpp"
#include "driver/device.hpp"
#include "driver/fork_guard.hpp"
#include "driver/virtual_memory.hpp"

namespace py = pybind11;

namespace spillover {

void register_driver(py::module_& module) {
  module.def("driver_available", &driver_available, ReleaseGil(),
             "Whether a CUDA driver can be loaded and has started.");
  module.def("in_forked_child", &in_forked_child,
             "Whether this process was forked from one that had loaded the driver.");
  module.def("driver_version", &driver_version, ReleaseGil(),
             "CUDA version that the driver supports: 1000 * major + 10 * minor.");
  module.def("device_count", &device_count, ReleaseGil(), "Number of devices.");
  module.def("device_name", &device_name, py::arg("device") = 0, ReleaseGil(),
             "What the device is called; makes no context.");
  module.def("device_total_bytes", &device_total_bytes, py::arg("device") = 0, ReleaseGil(),
             "Memory of the device; makes no context.");
  module.def("supports_virtual_memory", &supports_virtual_memory, py::arg("device") = 0,
             ReleaseGil(), "Whether the device has virtual memory management.");
  module.def(
      "memory_info",
      [](int device) {
        MemoryInfo info{};
        {
          const GilRelease released;
          info = memory_info(device);
        }
        return py::make_tuple(info.free_bytes, info.total_bytes);
      },
      py::arg("device") = 0, "Free and total bytes of a device, as its driver sees them.");
}

}  // namespace spillover
