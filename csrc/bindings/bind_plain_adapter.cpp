// What Python does for the plain adapter (allocator/_plain*.py), and what it asks of it.
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <utility>

#include "bindings/bindings.hpp"
#include "plain_adapter/allocator.hpp"
#include "plain_adapter/interpreter.hpp"
#include "plain_adapter/private_pools.hpp"
#include "plain_adapter/torch_functions.hpp"

namespace py = pybind11;

namespace spillover {
namespace {

using plain_adapter::PoolId;
using plain_adapter::PrivatePools;

void* pointer_of(uintptr_t address) {
  return reinterpret_cast<void*>(address);
}

// As GilRelease, for threads too that Python does not know, and after Python is gone.
void* release_gil() noexcept {
  return Py_IsInitialized() != 0 && PyGILState_Check() == 1 ? PyEval_SaveThread() : nullptr;
}

void take_back_gil(void* thread_state) noexcept {
  call_python([&] { PyEval_RestoreThread(static_cast<PyThreadState*>(thread_state)); });
}

// Needs the GIL. What is raised is reported: the thread is about to raise that memory has run out.
void tell_observer(PyObject* function, int device, size_t requested_bytes, size_t allowed_bytes,
                   size_t free_bytes) {
  PyObject* result =
      PyObject_CallFunction(function, "iKKK", device, requested_bytes, allowed_bytes, free_bytes);
  if (result == nullptr) PyErr_WriteUnraisable(function);
  Py_XDECREF(result);
}

void add_observer(const py::function& function) {
  PyObject* const held = function.inc_ref().ptr();  // Observers stay until the process ends.
  plain_adapter::add_out_of_memory_observer([held](int device, size_t requested_bytes,
                                                   size_t allowed_bytes, size_t free_bytes) {
    if (Py_IsInitialized() == 0) return;
    const GilAcquire gil;
    call_python([&] { tell_observer(held, device, requested_bytes, allowed_bytes, free_bytes); });
  });
}

void define_private_pools(py::module_& module) {
  module.def(
      "plain_add_pool_use",
      [](int device, const PoolId& id) { PrivatePools::instance().add_use(device, id); },
      py::arg("device"), py::arg("pool"), ReleaseGil());
  module.def(
      "plain_remove_pool_use",
      [](int device, const PoolId& id) { PrivatePools::instance().remove_use(device, id); },
      py::arg("device"), py::arg("pool"), ReleaseGil());
  module.def(
      "plain_pool_use_count",
      [](int device, const PoolId& id) { return PrivatePools::instance().use_count(device, id); },
      py::arg("device"), py::arg("pool"), ReleaseGil());
  module.def(
      "plain_set_pool_options",
      [](int device, const PoolId& id, bool use_on_oom, bool no_split) {
        PrivatePools::instance().set_options(device, id, use_on_oom, no_split);
      },
      py::arg("device"), py::arg("pool"), py::arg("use_on_oom"), py::arg("no_split"), ReleaseGil());
  module.def(
      "plain_trim_pool",
      [](int device, const PoolId& id) { PrivatePools::instance().trim(device, id); },
      py::arg("device"), py::arg("pool"), ReleaseGil());
  module.def(
      "plain_arena_of",
      [](int device, const PoolId& id) { return PrivatePools::instance().arena_of(device, id); },
      py::arg("device"), py::arg("pool"), ReleaseGil());
  module.def(
      "plain_pool_of",
      [](int device, uint32_t arena) { return PrivatePools::instance().id_of(device, arena); },
      py::arg("device"), py::arg("arena"), ReleaseGil(),
      "torch's number of the private pool that an arena is; (0, 0) where it is none.");
}

}  // namespace

void register_plain_adapter(py::module_& module) {
  plain_adapter::set_interpreter({release_gil, take_back_gil});
  define_private_pools(module);
  module.def(
      "plain_set_torch_functions",
      [](uintptr_t error_constructor, uintptr_t error_table, uintptr_t error_type,
         uintptr_t is_profiling, uintptr_t report_memory, uintptr_t report_out_of_memory) {
        plain_adapter::set_torch_functions({pointer_of(error_constructor), pointer_of(error_table),
                                            pointer_of(error_type), pointer_of(is_profiling),
                                            pointer_of(report_memory),
                                            pointer_of(report_out_of_memory)});
      },
      py::kw_only(), py::arg("error_constructor"), py::arg("error_table"), py::arg("error_type"),
      py::arg("is_profiling"), py::arg("report_memory"), py::arg("report_out_of_memory"),
      "Addresses of what the adapter calls of torch, 0 where torch has not the symbol.");
  module.def("plain_set_caching", &plain_adapter::set_caching, py::arg("keeps_idle"), ReleaseGil());
  module.def("plain_is_caching", &plain_adapter::is_caching);
  module.def("plain_add_observer", &add_observer, py::arg("function"),
             "Have a function see device, size, what the pool may hold and what is free, whenever "
             "memory has run out.");
  module.def("plain_set_peers", &plain_adapter::set_peers, py::arg("device"), py::arg("peers"),
             "Which devices can access the memory of a device, bit i for device i.");
}

}  // namespace spillover
