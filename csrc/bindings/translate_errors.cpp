// C++ errors become the Python exceptions of spillover._errors.
//
// spillover._errors is imported when the first error is translated, so that importing _core imports
// nothing of the package. DeviceOutOfMemoryError becomes DeviceOutOfMemory, a
// torch.OutOfMemoryError, only where torch is loaded: an out-of-memory error must not import it.
// Elsewhere it becomes DriverError, which like DeviceOutOfMemory is a SpilloverError and a
// RuntimeError, so handlers for these catch both.
#include <exception>
#include <string>

#include "base/error.hpp"
#include "bindings/bindings.hpp"

namespace py = pybind11;

namespace spillover {
namespace {

py::object error_class(const char* name) {
  return py::module_::import("spillover._errors").attr(name);
}

void raise(const char* class_name, const Error& error) {
  const py::object type = error_class(class_name);
  PyErr_SetObject(type.ptr(), type(py::str(error.what())).ptr());
}

// OSError takes errno, text and file name. Without an errno it gets the text alone: with a file
// name and no errno it would print "[Errno None] None" in the text's place. Messages name the file
// anyhow.
void raise_storage_error(const char* class_name, const StorageError& error) {
  const py::object type = error_class(class_name);
  const py::str text(error.what());
  const py::object instance = error.native_error() != 0
                                  ? type(error.native_error(), text, py::str(error.path()))
                                  : type(text);
  PyErr_SetObject(type.ptr(), instance.ptr());
}

bool torch_is_loaded() {
  return py::module_::import("sys").attr("modules").contains("torch");
}

// By value, as pybind11 declares a translator.
void translate(std::exception_ptr pointer) {  // NOLINT(performance-unnecessary-value-param)
  if (!pointer) return;
  try {
    std::rethrow_exception(pointer);
  } catch (const ConfigError& error) {
    raise("ConfigError", error);
  } catch (const StateError& error) {
    raise("StateError", error);
  } catch (const DeviceOutOfMemoryError& error) {
    raise(torch_is_loaded() ? "DeviceOutOfMemory" : "DriverError", error);
  } catch (const HostOutOfMemoryError& error) {
    raise("HostOutOfMemory", error);
  } catch (const DriverError& error) {
    raise("DriverError", error);
  } catch (const DiskFullError& error) {
    raise_storage_error("DiskFull", error);
  } catch (const CorruptDataError& error) {
    raise_storage_error("CorruptData", error);
  } catch (const StorageError& error) {
    raise_storage_error("StorageError", error);
  } catch (const Error& error) {
    raise("SpilloverError", error);
  }
}

}  // namespace

void register_errors(py::module_&) {
  py::register_exception_translator(&translate);
}

}  // namespace spillover
