// Python's view of durable stores.
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/error.hpp"
#include "bindings/bindings.hpp"
#include "bindings/disk_requests.hpp"
#include "bindings/living.hpp"
#include "tiers/durable_store.hpp"

namespace py = pybind11;

namespace spillover {
namespace {

std::shared_ptr<DurableStore> make(std::vector<std::string> folders,
                                   const std::vector<std::pair<std::string, uint64_t>>& entries,
                                   std::optional<uint64_t> extent_bytes,
                                   std::optional<uint64_t> extra_limit_bytes,
                                   const std::string& engine,
                                   std::optional<uint64_t> write_limit_bytes,
                                   size_t threads_per_folder, size_t queue_length_max) {
  DurableStoreOptions options;
  options.store.folders = std::move(folders);
  for (const auto& [name, size_bytes] : entries) {
    options.store.entries.push_back({name, size_bytes});
  }
  options.store.extent_bytes_max = extent_bytes;
  options.store.extra_bytes_max = extra_limit_bytes;
  options.engine = engine_named(engine);
  if (write_limit_bytes) options.write_limit_bytes = *write_limit_bytes;
  options.threads_per_folder = threads_per_folder;
  options.queue_length_max = queue_length_max;
  std::shared_ptr<DurableStore> store;
  {
    const GilRelease released;
    store = std::make_shared<DurableStore>(options);
  }
  return living<DurableStore>().add(std::move(store));
}

std::unique_ptr<PythonTicket> write(DurableStore& store, const std::string& entry,
                                    const py::buffer& buffer, uint64_t offset, py::object after) {
  py::buffer_info info = contiguous_memory(buffer, false);
  const size_t size_bytes = size_of(info);
  WriteGate gate = gate_for(after);
  auto ticket = std::make_unique<PythonTicket>(std::move(info), std::move(after));
  {
    const GilRelease released;
    ticket->started(store.write({entry, offset, size_bytes}, ticket->address(), std::move(gate)));
  }
  return ticket;
}

std::unique_ptr<PythonTicket> read(DurableStore& store, const std::string& entry,
                                   const py::buffer& buffer, uint64_t offset, bool committed) {
  py::buffer_info info = contiguous_memory(buffer, true);
  const size_t size_bytes = size_of(info);
  auto ticket = std::make_unique<PythonTicket>(std::move(info), py::none());
  {
    const GilRelease released;
    ticket->started(store.read({entry, offset, size_bytes}, ticket->address(),
                               committed ? DurableContents::kCommitted : DurableContents::kNewest));
  }
  return ticket;
}

uint64_t commit(DurableStore& store, const py::bytes& extra, uint8_t kind) {
  const auto text = extra.cast<std::string_view>();
  const auto* first = reinterpret_cast<const std::byte*>(text.data());
  const DurableExtra given{kind, {first, first + text.size()}};
  const GilRelease released;
  return store.commit(given);
}

py::tuple extra_of(const DurableStore& store) {
  const DurableExtra extra = store.extra();
  return py::make_tuple(
      extra.kind, py::bytes(reinterpret_cast<const char*>(extra.bytes.data()), extra.bytes.size()));
}

}  // namespace

void register_durable_store(py::module_& module) {
  py::class_<DurableFolderStats>(module, "DurableFolderStats", "One folder of a DurableStore.")
      .def_readonly("folder", &DurableFolderStats::folder)
      .def_readonly("is_direct", &DurableFolderStats::is_direct)
      .def_readonly("file_bytes", &DurableFolderStats::file_bytes)
      .def_readonly("writes", &DurableFolderStats::writes)
      .def_readonly("reads", &DurableFolderStats::reads);
  py::class_<DurableStats>(module, "DurableStats", "A DurableStore at one moment.")
      .def_readonly("sequence", &DurableStats::sequence)
      .def_readonly("written_bytes", &DurableStats::written_bytes)
      .def_readonly("read_bytes", &DurableStats::read_bytes)
      .def_readonly("file_bytes", &DurableStats::file_bytes)
      .def_readonly("pending_extents", &DurableStats::pending_extents)
      .def_readonly("is_direct", &DurableStats::is_direct)
      .def_property_readonly("engine",
                             [](const DurableStats& stats) { return name_of(stats.engine); })
      .def_readonly("engine_notes", &DurableStats::engine_notes)
      .def_readonly("notes", &DurableStats::notes)
      .def_readonly("folders", &DurableStats::folders)
      .def_readonly("waits", &DurableStats::waits)
      .def_readonly("commits", &DurableStats::commits);
  module.def(
      "living_durable_stores", [] { return living<DurableStore>().all(); },
      "The durable stores of this process, for statistics.");
  py::class_<DurableStore, std::shared_ptr<DurableStore>>(module, "DurableStore",
                                                          "Storage that outlives its process.")
      .def(py::init(&make), py::arg("folders"), py::arg("entries"), py::kw_only(),
           py::arg("extent_bytes") = py::none(), py::arg("extra_limit_bytes") = py::none(),
           py::arg("engine") = "auto", py::arg("write_limit_bytes") = py::none(),
           py::arg("threads_per_folder") = 4, py::arg("queue_length_max") = 64)
      .def("write", &write, py::arg("entry"), py::arg("buffer"), py::kw_only(),
           py::arg("offset") = 0, py::arg("after") = py::none())
      .def("read", &read, py::arg("entry"), py::arg("buffer"), py::kw_only(), py::arg("offset") = 0,
           py::arg("committed") = false)
      .def("_commit", &commit, py::arg("extra"), py::arg("kind"))
      .def("_extra", &extra_of)
      .def("_entries",
           [](const DurableStore& store) {
             py::list entries;
             for (const DurableEntry& entry : store.entries()) {
               entries.append(py::make_tuple(entry.name, entry.size_bytes));
             }
             return entries;
           })
      .def("is_committed", &DurableStore::is_committed, py::arg("entry"))
      .def("rollback", &DurableStore::rollback, ReleaseGil())
      .def("verify", &DurableStore::verify, ReleaseGil())
      .def(
          "register",
          [](py::object store, const py::buffer& buffer) {
            return MemoryRegistration::make<DurableStore>(std::move(store), buffer);
          },
          py::arg("buffer"))
      .def("close", &DurableStore::close, ReleaseGil())
      .def("stats", &DurableStore::stats, ReleaseGil())
      .def_property_readonly("extent_bytes", &DurableStore::extent_bytes);
  module.def("delete_durable", &delete_durable, py::arg("folders"), ReleaseGil());
}

}  // namespace spillover
