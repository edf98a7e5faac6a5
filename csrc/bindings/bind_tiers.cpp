// Python's view of the disk tier: DiskStore, DiskPayload, Ticket.
#include <pybind11/stl.h>

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/crc32c.hpp"
#include "base/error.hpp"
#include "bindings/bindings.hpp"
#include "bindings/disk_requests.hpp"
#include "bindings/living.hpp"
#include "tiers/disk_store.hpp"

namespace py = pybind11;

namespace spillover {
namespace {

py::tuple write(DiskStore& store, const py::buffer& buffer, py::object after) {
  py::buffer_info info = contiguous_memory(buffer, false);
  const size_t size_bytes = size_of(info);
  WriteGate gate = gate_for(after);
  auto ticket = std::make_unique<PythonTicket>(std::move(info), std::move(after));
  WriteRequest request;
  {
    const GilRelease released;
    request = store.write(ticket->address(), size_bytes, std::move(gate));
  }
  ticket->started(std::move(request.ticket));
  return py::make_tuple(std::move(request.payload), std::move(ticket));
}

std::unique_ptr<PythonTicket> read(DiskStore& store, std::shared_ptr<DiskPayload> payload,
                                   const py::buffer& buffer) {
  py::buffer_info info = contiguous_memory(buffer, true);
  if (size_of(info) < payload->size_bytes()) {
    throw ConfigError("the buffer has " + std::to_string(size_of(info)) +
                      " bytes and the payload " + std::to_string(payload->size_bytes()));
  }
  auto ticket = std::make_unique<PythonTicket>(std::move(info), py::none());
  {
    const GilRelease released;
    ticket->started(store.read(std::move(payload), ticket->address()));
  }
  return ticket;
}

std::shared_ptr<DiskStore> make_disk_store(std::vector<std::string> folders,
                                           const std::string& engine,
                                           std::optional<uint64_t> limit_bytes,
                                           std::optional<uint64_t> write_limit_bytes,
                                           size_t threads_per_folder, size_t queue_length_max,
                                           size_t extent_bytes_max, bool preallocate) {
  DiskStoreOptions options;
  options.folders = std::move(folders);
  options.engine = engine_named(engine);
  if (limit_bytes) options.limit_bytes = *limit_bytes;
  if (write_limit_bytes) options.write_limit_bytes = *write_limit_bytes;
  options.threads_per_folder = threads_per_folder;
  options.queue_length_max = queue_length_max;
  options.extent_bytes_max = extent_bytes_max;
  options.preallocation = preallocate ? Preallocation::kReserve : Preallocation::kNone;
  std::shared_ptr<DiskStore> store;
  {
    const GilRelease released;
    store = std::make_shared<DiskStore>(options);
  }
  return living<DiskStore>().add(std::move(store));
}

void register_disk_stats(py::module_& module) {
  py::class_<WaitStats>(module, "WaitStats", "Host threads that waited.")
      .def_readonly("count", &WaitStats::count)
      .def_readonly("seconds", &WaitStats::seconds);
  py::class_<DiskDirectionStats>(module, "DiskDirectionStats", "One direction of a folder.")
      .def_readonly("bytes", &DiskDirectionStats::bytes)
      .def_readonly("extents", &DiskDirectionStats::extents)
      .def_readonly("errors", &DiskDirectionStats::errors)
      .def_readonly("resubmits", &DiskDirectionStats::resubmits)
      .def_readonly("queue_depth", &DiskDirectionStats::queue_depth)
      .def_readonly("queue_depth_max", &DiskDirectionStats::queue_depth_max)
      .def_readonly("busy_s", &DiskDirectionStats::busy_s)
      .def_readonly("queued_s", &DiskDirectionStats::queued_s)
      .def_readonly("moving_s", &DiskDirectionStats::moving_s)
      .def_readonly("checksum_s", &DiskDirectionStats::checksum_s)
      .def_readonly("submitting_s", &DiskDirectionStats::submitting_s);
  py::class_<DiskFolderStats>(module, "DiskFolderStats", "One folder of a DiskStore.")
      .def_readonly("folder", &DiskFolderStats::folder)
      .def_readonly("is_direct", &DiskFolderStats::is_direct)
      .def_readonly("used_bytes", &DiskFolderStats::used_bytes)
      .def_readonly("file_bytes", &DiskFolderStats::file_bytes)
      .def_readonly("bandwidth_bytes_s", &DiskFolderStats::bandwidth_bytes_s)
      .def_readonly("writes", &DiskFolderStats::writes)
      .def_readonly("reads", &DiskFolderStats::reads);
}

void register_disk_store(py::module_& module) {
  register_disk_stats(module);
  py::class_<DiskStats>(module, "DiskStats", "Counters of a DiskStore at one moment.")
      .def_readonly("written_bytes", &DiskStats::written_bytes)
      .def_readonly("read_bytes", &DiskStats::read_bytes)
      .def_readonly("used_bytes", &DiskStats::used_bytes)
      .def_readonly("file_bytes", &DiskStats::file_bytes)
      .def_readonly("pending_extents", &DiskStats::pending_extents)
      .def_readonly("is_direct", &DiskStats::is_direct)
      .def_property_readonly("engine", [](const DiskStats& stats) { return name_of(stats.engine); })
      .def_readonly("engine_notes", &DiskStats::engine_notes)
      .def_readonly("folders", &DiskStats::folders)
      .def_readonly("waits", &DiskStats::waits);
  py::class_<PythonTicket>(module, "Ticket", "Completion of a disk request.")
      .def("is_done", &PythonTicket::is_done)
      .def("wait", &PythonTicket::wait);
  py::class_<DiskPayload, std::shared_ptr<DiskPayload>>(module, "DiskPayload",
                                                        "Bytes that a DiskStore holds.")
      .def_property_readonly("size_bytes", &DiskPayload::size_bytes)
      .def_property_readonly(
          "is_stored",
          [](const DiskPayload& payload) { return payload.state() == DiskPayload::State::kStored; })
      .def("_extents", [](const DiskPayload& payload) {
        py::list extents;
        if (payload.state() != DiskPayload::State::kStored) return extents;
        for (const Extent& extent : payload.extents()) {
          extents.append(py::make_tuple(extent.folder, extent.offset, extent.size_bytes));
        }
        return extents;
      });
  py::class_<MemoryRegistration>(module, "MemoryRegistration",
                                 "Memory that a DiskStore has prepared for many requests.")
      .def_property_readonly("registered_bytes", &MemoryRegistration::registered_bytes)
      .def("remove", &MemoryRegistration::remove);
  module.def(
      "living_disk_stores", [] { return living<DiskStore>().all(); },
      "The disk stores of this process, for statistics.");
  py::class_<DiskStore, std::shared_ptr<DiskStore>>(module, "DiskStore",
                                                    "Scratch storage in folders, asynchronous.")
      .def(py::init(&make_disk_store), py::arg("folders"), py::kw_only(),
           py::arg("engine") = "auto", py::arg("limit_bytes") = py::none(),
           py::arg("write_limit_bytes") = py::none(), py::arg("threads_per_folder") = 4,
           py::arg("queue_length_max") = 64, py::arg("extent_bytes_max") = size_t{8} << 20,
           py::arg("preallocate") = true)
      .def("write", &write, py::arg("buffer"), py::kw_only(), py::arg("after") = py::none())
      .def("read", &read, py::arg("payload"), py::arg("buffer"))
      .def(
          "register",
          [](py::object store, const py::buffer& buffer) {
            return MemoryRegistration::make<DiskStore>(std::move(store), buffer);
          },
          py::arg("buffer"))
      .def("close", &DiskStore::close, ReleaseGil())
      .def("stats", &DiskStore::stats, ReleaseGil())
      .def("_descriptor", &DiskStore::descriptor, py::arg("folder") = 0);
}

uint32_t checksum(const py::buffer& data, uint32_t seed) {
  const py::buffer_info info = contiguous_memory(data, false);
  const GilRelease release;
  return crc32c(info.ptr, size_of(info), seed);
}

std::map<std::string, uint32_t> checksum_each_way(const py::buffer& data, uint32_t seed) {
  const py::buffer_info info = contiguous_memory(data, false);
  std::map<std::string, uint32_t> sums;
  for (const Crc32cWay& way : crc32c_ways()) {
    sums[way.name] = way.sum(info.ptr, size_of(info), seed);
  }
  return sums;
}

void register_crc(py::module_& module) {
  module.def("crc32c", &checksum, py::arg("data"), py::arg("seed") = 0,
             "CRC-32C of the bytes of a contiguous buffer; seed is the sum of what came before.");
  module.def("_crc32c_ways", &checksum_each_way, py::arg("data"), py::arg("seed") = 0,
             "The sum by each way that this machine has, by its name.");
  module.def("join_crc32c", &join_crc32c, py::arg("first"), py::arg("second"),
             py::arg("second_size_bytes"), "The sum of two pieces, from the sum of each.");
}

}  // namespace

void register_tiers(py::module_& module) {
  register_disk_store(module);
  register_crc(module);
}

}  // namespace spillover
