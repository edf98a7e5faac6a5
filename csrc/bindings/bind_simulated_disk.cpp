// Python's view of the simulated disk: used by tests and by the crash benchmark only.
#include <pybind11/stl.h>

#include <memory>
#include <optional>

#include "bindings/bindings.hpp"
#include "tiers/simulated_disk.hpp"

namespace py = pybind11;

namespace spillover {

void register_simulated_disk(py::module_& module) {
  py::class_<DiskHistory, std::shared_ptr<DiskHistory>>(
      module, "DiskHistory", "What was done to a simulated disk, to be cut anywhere.")
      .def("__len__", &DiskHistory::size)
      .def("describe", &DiskHistory::describe, py::arg("event"));
  module.def("simulated_disk_begin", [] { SimulatedDisk::instance().begin(); });
  module.def("simulated_disk_end", [] { SimulatedDisk::instance().end(); });
  module.def("simulated_disk_events", [] { return SimulatedDisk::instance().event_count(); });
  module.def("simulated_disk_take_history",
             [] { return SimulatedDisk::instance().take_history(); });
  module.def(
      "simulated_disk_crash",
      [](const std::shared_ptr<DiskHistory>& history, size_t cut, uint64_t seed, bool ignores_syncs,
         std::optional<size_t> ignored_sync) {
        using Ignored = DiskHistory::Cut::Ignored;
        const Ignored ignored = ignores_syncs  ? Ignored::kAll
                                : ignored_sync ? Ignored::kOne
                                               : Ignored::kNone;
        SimulatedDisk::instance().crash(*history, {cut, seed, ignored, ignored_sync.value_or(0)});
      },
      py::arg("history"), py::arg("cut"), py::arg("seed"), py::kw_only(),
      py::arg("ignores_syncs") = false, py::arg("ignored_sync") = py::none());
}

}  // namespace spillover
