// What the files of the Python module spillover._core share. PRIVATE to bindings/.
//
// Note [The GIL]. The GIL is the outermost lock: nothing below this layer takes it. A binding that
// can block, wait for a lock or call the driver releases it, and builds Python objects only once it
// is held again.
#pragma once

#include <pybind11/pybind11.h>

namespace spillover {

void register_errors(pybind11::module_& module);
void register_driver(pybind11::module_& module);
void register_allocator(pybind11::module_& module);
void register_tiers(pybind11::module_& module);
void register_storage_faults(pybind11::module_& module);

using ReleaseGil = pybind11::call_guard<pybind11::gil_scoped_release>;

}  // namespace spillover
