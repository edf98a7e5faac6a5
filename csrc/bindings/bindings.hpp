// What the files of the Python module spillover._core share. PRIVATE to bindings/.
//
// Note [The GIL]. The GIL is the outermost lock: nothing below this layer takes it. A binding that
// can block, wait for a lock or call the driver releases it, and builds Python objects only once it
// is held again.
#pragma once

#include <pybind11/pybind11.h>
#include <unistd.h>

namespace spillover {

void register_errors(pybind11::module_& module);
void register_driver(pybind11::module_& module);
void register_allocator(pybind11::module_& module);
void register_plain_adapter(pybind11::module_& module);
void register_dlpack(pybind11::module_& module);
void register_trace(pybind11::module_& module);
void register_host_pool(pybind11::module_& module);
void register_tiers(pybind11::module_& module);
void register_transfer(pybind11::module_& module);
void register_optim(pybind11::module_& module);
void register_gpu_direct(pybind11::module_& module);
void register_durable_store(pybind11::module_& module);
void register_storage_faults(pybind11::module_& module);
void register_simulated_disk(pybind11::module_& module);

// Calls what runs Python code or wants the GIL, from below frames that must not be unwound. Once
// the program is over, the interpreter ends a daemon thread that wants the GIL by unwinding its
// stack; here the thread sleeps until the process is gone instead. Nothing within the call may need
// a destructor to run.
template <class Call>
auto call_python(Call call) noexcept {
  try {
    return call();
  } catch (...) {
    for (;;) pause();
  }
}

// Releases the GIL while it lives. Unlike pybind11's, it may be left by an exception when the
// program is over, and then ends no thread: an unwinding within the exception's would abort the
// process.
class GilRelease {
 public:
  GilRelease() : thread_state_(PyEval_SaveThread()) {}
  ~GilRelease() {
    call_python([this] { PyEval_RestoreThread(thread_state_); });
  }
  GilRelease(const GilRelease&) = delete;
  GilRelease& operator=(const GilRelease&) = delete;

 private:
  PyThreadState* const thread_state_;
};

using ReleaseGil = pybind11::call_guard<GilRelease>;

// Holds the GIL while it lives, on a thread that may be the interpreter's or not.
class GilAcquire {
 public:
  GilAcquire() noexcept : state_(call_python(PyGILState_Ensure)) {}
  ~GilAcquire() { PyGILState_Release(state_); }
  GilAcquire(const GilAcquire&) = delete;
  GilAcquire& operator=(const GilAcquire&) = delete;

 private:
  const PyGILState_STATE state_;
};

}  // namespace spillover
