// Python's view of injected storage faults: used by spillover.emulator.faults() only.
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/bindings.hpp"
#include "tiers/storage_faults.hpp"

namespace py = pybind11;

namespace spillover {
namespace {

// Operation, kind, errno, first call, times, probability, delay in microseconds, folder.
using Row = std::tuple<std::string, StorageFaultKind, int, uint64_t, uint64_t, double, uint64_t,
                       std::string>;

void begin(const std::vector<Row>& rows, uint64_t seed) {
  std::vector<StorageFault> plan;
  for (const auto& [operation, kind, native_error, first_call, times, probability, delay_us,
                    folder] : rows) {
    plan.push_back(
        {operation, kind, native_error, first_call, times, probability, delay_us, folder});
  }
  StorageFaults::instance().begin(std::move(plan), seed);
}

}  // namespace

void register_storage_faults(py::module_& module) {
  py::enum_<StorageFaultKind>(module, "StorageFaultKind")
      .value("error", StorageFaultKind::kError)
      .value("short", StorageFaultKind::kShort)
      .value("flip", StorageFaultKind::kFlip)
      .value("torn", StorageFaultKind::kTorn)
      .value("delay", StorageFaultKind::kDelay);
  module.def("storage_faults_begin", &begin, py::arg("rows"), py::arg("seed"));
  module.def("storage_faults_end", [] { StorageFaults::instance().end(); });
  module.def("storage_faults_fired", [] { return StorageFaults::instance().fired(); });
  module.def("storage_calls", [] { return StorageFaults::instance().calls(); });
}

}  // namespace spillover
