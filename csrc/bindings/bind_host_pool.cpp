// Python's view of host memory: HostPool, HostBuffer, and what limits them.
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "base/error.hpp"
#include "bindings/bindings.hpp"
#include "bindings/living.hpp"
#include "tiers/host_pool.hpp"
#include "tiers/numa.hpp"
#include "tiers/system_memory.hpp"

namespace py = pybind11;

namespace spillover {
namespace {

HugePages huge_pages_named(const std::string& name) {
  if (name == "auto") return HugePages::kAdvise;
  if (name == "never") return HugePages::kNever;
  if (name == "reserved") return HugePages::kReserved;
  throw ConfigError("huge_pages='" + name + "' is not known; choose auto, reserved or never");
}

// node is -1 for the nearest one; nothing for any.
std::shared_ptr<HostPool> make_host_pool(std::optional<size_t> limit_bytes,
                                         std::string limit_source, int device, bool pinned,
                                         const std::string& huge_pages, std::optional<int> node,
                                         size_t region_bytes_max, std::string system_root) {
  HostPoolOptions options;
  if (limit_bytes) options.limit_bytes = *limit_bytes;
  options.limit_source = std::move(limit_source);
  options.device = device;
  options.pinning = pinned ? Pinning::kPinned : Pinning::kPageable;
  options.huge_pages = huge_pages_named(huge_pages);
  options.numa = !node ? NumaChoice::kAny : *node < 0 ? NumaChoice::kNearest : NumaChoice::kNode;
  options.numa_node = node.value_or(0);
  options.region_bytes_max = region_bytes_max;
  options.system_root = std::move(system_root);
  return living<HostPool>().add(HostPool::create(options));
}

// progress is called with the GIL, now and then; where there is none signals are looked for, so
// that Ctrl-C ends a long wait.
void reserve(HostPool& pool, size_t size_bytes, const py::object& progress) {
  const auto tell = [&](size_t done_bytes) {
    const GilAcquire acquired;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (!progress.is_none()) progress(done_bytes);
  };
  const GilRelease released;
  pool.reserve(size_bytes, tell);
}

py::tuple as_tuple(const HostMemoryLimit& limit) {
  return py::make_tuple(limit.bytes, limit.source);
}

void register_stats(py::module_& module) {
  py::class_<HostStats>(module, "HostStats", "Bytes and buffers of a HostPool at one moment.")
      .def_readonly("used_bytes", &HostStats::used_bytes)
      .def_readonly("used_bytes_max", &HostStats::used_bytes_max)
      .def_readonly("reserved_bytes", &HostStats::reserved_bytes)
      .def_readonly("reserved_bytes_max", &HostStats::reserved_bytes_max)
      .def_readonly("buffer_count", &HostStats::buffer_count)
      .def_readonly("ahead_bytes", &HostStats::ahead_bytes)
      .def_readonly("huge_page_bytes", &HostStats::huge_page_bytes)
      .def_readonly("numa_node", &HostStats::numa_node)
      .def_readonly("numa_note", &HostStats::numa_note)
      .def_property_readonly("limit_bytes", [](const HostStats& stats) -> std::optional<size_t> {
        if (stats.limit_bytes == SIZE_MAX) return std::nullopt;
        return stats.limit_bytes;
      });
  py::class_<PinStats>(module, "PinStats", "Pinning of host memory, of all pools together.")
      .def_readonly("count", &PinStats::count)
      .def_readonly("bytes", &PinStats::bytes)
      .def_readonly("pin_s", &PinStats::pin_s)
      .def_readonly("unpin_s", &PinStats::unpin_s);
}

}  // namespace

void register_host_pool(py::module_& module) {
  register_stats(module);
  py::class_<HostBuffer>(module, "HostBuffer", py::buffer_protocol(),
                         "Memory of a HostPool; goes back to it when the last reference is gone.")
      .def_property_readonly(
          "address",
          [](const HostBuffer& buffer) { return reinterpret_cast<uintptr_t>(buffer.address()); })
      .def_property_readonly("size_bytes", &HostBuffer::size_bytes)
      .def("__len__", &HostBuffer::size_bytes)
      .def_buffer([](HostBuffer& buffer) {
        return py::buffer_info(reinterpret_cast<uint8_t*>(buffer.address()),
                               static_cast<py::ssize_t>(buffer.size_bytes()));
      });
  py::class_<HostPool, std::shared_ptr<HostPool>>(module, "HostPool",
                                                  "Pinned host memory under a byte budget.")
      .def(py::init(&make_host_pool), py::kw_only(), py::arg("limit_bytes") = py::none(),
           py::arg("limit_source") = "", py::arg("device") = 0, py::arg("pinned") = true,
           py::arg("huge_pages") = "auto", py::arg("numa_node") = -1,
           py::arg("region_bytes_max") = HostPoolOptions().region_bytes_max,
           py::arg("system_root") = "")
      .def("allocate", &HostPool::allocate, py::arg("size_bytes"), ReleaseGil())
      .def("_reserve", &reserve, py::arg("size_bytes"), py::arg("progress"))
      .def("trim", &HostPool::trim, ReleaseGil())
      .def("stats", &HostPool::stats, ReleaseGil())
      .def("_is_valid", &HostPool::is_valid, ReleaseGil());
  module.def("pin_stats", &pin_stats, "What this process has pinned so far.");
  module.def(
      "living_host_pools", [] { return living<HostPool>().all(); },
      "The host pools of this process, for statistics.");
  module.def(
      "available_host_memory",
      [](const std::string& root) { return as_tuple(available_host_memory(root)); },
      py::arg("root") = "",
      "Bytes that the machine and the process's memory control groups leave, and which limit says "
      "so.");
  module.def(
      "total_host_memory",
      [](const std::string& root) { return as_tuple(total_host_memory(root)); },
      py::arg("root") = "",
      "Bytes that they allow at most, in use or not, and which limit says so.");
  module.def("numa_node_count", &numa_node_count, py::arg("root") = "");
  module.def("numa_node_of_pci", &numa_node_of_pci, py::arg("address"), py::arg("root") = "");
}

}  // namespace spillover
