// Gives up Python's interpreter lock around a wait.
//
// A value of this type lives on one thread's stack. Any thread may make one, also a thread that
// Python does not know, or one in a process without Python: it then does nothing.
//
// Note [GIL]: the pool may wait for the device when memory runs out. A host function on that device
// may need the interpreter lock, so no thread waits in the pool while it holds the lock. Most of
// torch's operators have released it before they allocate, but tensors are freed, and statistics
// read, by threads that hold it. The pool's mutex is such a wait too, as its holder may wait for
// the device. So every call that takes the mutex gives up the lock first; frees, which are many, do
// so only where spillover_try_free() has found that they would wait.
#pragma once

#include <Python.h>

namespace spillover::torch_adapter {

class GilRelease {
 public:
  GilRelease() noexcept
      : thread_state_(Py_IsInitialized() != 0 && PyGILState_Check() == 1 ? PyEval_SaveThread()
                                                                         : nullptr) {}
  ~GilRelease() {
    if (thread_state_ != nullptr) PyEval_RestoreThread(thread_state_);
  }
  GilRelease(const GilRelease&) = delete;
  GilRelease& operator=(const GilRelease&) = delete;

 private:
  PyThreadState* const thread_state_;
};

// Calls the pool without the interpreter lock.
template <class Call>
auto without_gil(Call call) {
  const GilRelease no_gil;
  return call();
}

}  // namespace spillover::torch_adapter
