// Python's view of GPUDirect Storage: whether it works.
#include <pybind11/stl.h>

#include <string>

#include "bindings/bindings.hpp"
#include "tiers/gpu_direct.hpp"

namespace py = pybind11;

namespace spillover {

void register_gpu_direct(py::module_& module) {
  py::class_<GpuDirectAnswer>(module, "GpuDirectAnswer", "Whether GPUDirect Storage works.")
      .def_readonly("works", &GpuDirectAnswer::works)
      .def_readonly("library_version", &GpuDirectAnswer::library_version)
      .def_readonly("reason", &GpuDirectAnswer::reason);
  module.def("probe_gpu_direct", &probe_gpu_direct, py::arg("library"), py::arg("folder"),
             py::arg("device") = 0, ReleaseGil(),
             "Move a block between a scratch file in the folder and a device by cuFile.");
}

}  // namespace spillover
