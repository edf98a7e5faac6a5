// The one way into the driver: each cu* function is one call of plain(), with_driver() or
// with_context(), so that initialisation, forks, callbacks, sticky errors, the random schedule and
// injected faults are handled in one place.
//
// Any thread may call; bodies of with_driver and with_context run with Machine::mutex held.
#pragma once

#include <cuda.h>

#include <new>
#include <utility>

#include "emulator/core/call_site.hpp"
#include "emulator/core/context.hpp"
#include "emulator/core/fault_api.h"
#include "emulator/core/fault_plan.hpp"
#include "emulator/core/machine.hpp"
#include "emulator/core/process.hpp"
#include "emulator/core/report.hpp"
#include "emulator/core/types.hpp"

namespace spillover::emulator {

// Whether this thread may call the driver at all. Touches no lock, so a forked child gets its error
// whatever its parent's threads were doing.
inline CUresult admit() {
  if (!process_ready()) return CUDA_ERROR_NOT_INITIALIZED;
  return in_callback() ? CUDA_ERROR_NOT_PERMITTED : CUDA_SUCCESS;
}

// Sees every outcome on its way out. Reports failures where SPILLOVER_EMULATOR_VERBOSE asks for it.
CUresult finish_call(const char* name, CUresult result);

// What an injected fault makes of a call; costs one predictable branch where nothing is injected.
class Injection {
 public:
  explicit Injection(const char* name) {
    if (__atomic_load_n(&spillover_emulator_observes_calls, __ATOMIC_RELAXED) == 0) return;
    at_once_ = static_cast<CUresult>(spillover_emulator_observe_call(name, &late_));
  }

  CUresult at_once() const { return at_once_; }

  // The call's result after its work is done.
  CUresult of(CUresult result) const {
    return late_ == CUDA_SUCCESS || result != CUDA_SUCCESS ? result : static_cast<CUresult>(late_);
  }

 private:
  CUresult at_once_ = CUDA_SUCCESS;
  int late_ = CUDA_SUCCESS;
};

// Adds to the bytes that calls of this function were about, once one has succeeded.
inline void note_bytes(const char* name, std::size_t size_bytes) {
  if (__atomic_load_n(&spillover_emulator_observes_calls, __ATOMIC_RELAXED) == 0) return;
  if (process_state() != ProcessState::kForked) FaultPlan::instance().add_bytes(name, size_bytes);
}

// A function that needs neither a device nor state, and works even in a forked child.
template <typename Body>
CUresult plain(const char* name, Body&& body) {
  const Injection injection(name);
  if (injection.at_once() != CUDA_SUCCESS) return finish_call(name, injection.at_once());
  return finish_call(name, injection.of(std::forward<Body>(body)()));
}

// body() -> CUresult, for a function of nothing but the calling thread's own state. Without a lock:
// torch asks for the current device several times an operator.
template <typename Body>
CUresult with_thread(const char* name, Body&& body) {
  const CUresult admitted = admit();
  if (admitted != CUDA_SUCCESS) return finish_call(name, admitted);
  const Injection injection(name);
  if (injection.at_once() != CUDA_SUCCESS) return finish_call(name, injection.at_once());
  return finish_call(name, injection.of(std::forward<Body>(body)()));
}

// Counts a call on the virtual clock, while Machine::mutex is held.
class ClockedCall {
 public:
  ClockedCall(Machine& machine, const char* name) : clock_(machine.clock) {
    if (clock_.enabled()) clock_.charge_call(name);
  }
  ~ClockedCall() {
    if (clock_.enabled()) clock_.note_memory();
  }
  ClockedCall(const ClockedCall&) = delete;
  ClockedCall& operator=(const ClockedCall&) = delete;

 private:
  Clock& clock_;
};

// body(Machine&, Lock&) -> CUresult
template <typename Body>
CUresult with_driver(const char* name, Body&& body) {
  const CUresult admitted = admit();
  if (admitted != CUDA_SUCCESS) return finish_call(name, admitted);
  const Injection injection(name);
  if (injection.at_once() != CUDA_SUCCESS) return finish_call(name, injection.at_once());
  Machine& machine = Machine::instance();
  const ReportScope reports;
  const CallScope call(name);
  try {
    Lock lock(machine.mutex);
    machine.scheduler.perturb(lock);
    const ClockedCall clocked(machine, name);
    return finish_call(name, injection.of(std::forward<Body>(body)(machine, lock)));
  } catch (const std::bad_alloc&) {
    return finish_call(name, CUDA_ERROR_OUT_OF_MEMORY);
  } catch (const WaitTimedOut&) {
    return finish_call(name, CUDA_ERROR_TIMEOUT);
  }
}

// body(Machine&, Lock&, Context&) -> CUresult, with the thread's current context, whose device has
// no sticky error.
template <typename Body>
CUresult with_context(const char* name, Body&& body) {
  return with_driver(name, [&](Machine& machine, Lock& lock) {
    Context* context = CurrentContext::get();
    if (context == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
    if (!context->is_live) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    const CUresult sticky = machine.sticky_error(context->device);
    if (sticky != CUDA_SUCCESS) return sticky;
    return std::forward<Body>(body)(machine, lock, *context);
  });
}

// with_driver for a function of one stream: body(Machine&, Lock&, const StreamRef&) -> CUresult.
template <typename Body>
CUresult with_stream(const char* name, CUstream handle, Body&& body) {
  return with_driver(name, [&](Machine& machine, Lock& lock) {
    StreamRef stream;
    const CUresult found = machine.streams.find(handle, &stream);
    if (found != CUDA_SUCCESS) return found;
    const CUresult sticky = machine.sticky_error(stream->device);
    if (sticky != CUDA_SUCCESS) return sticky;
    return std::forward<Body>(body)(machine, lock, stream);
  });
}

// The same for a function that puts work on the stream, which a capture may forbid.
template <typename Body>
CUresult with_work(const char* name, CUstream handle, Body&& body) {
  return with_stream(name, handle, [&](Machine& machine, Lock& lock, const StreamRef& stream) {
    const CUresult admitted = machine.captures.admit_work(stream);
    return admitted != CUDA_SUCCESS ? admitted : std::forward<Body>(body)(machine, lock, stream);
  });
}

// with_context for a function that CUDA calls potentially unsafe during a capture.
template <typename Body>
CUresult with_unsafe_context(const char* name, Body&& body) {
  return with_context(name, [&](Machine& machine, Lock& lock, Context& context) {
    const CUresult admitted = machine.captures.admit_unsafe_call();
    return admitted != CUDA_SUCCESS ? admitted : std::forward<Body>(body)(machine, lock, context);
  });
}

// What a program prefers makes no difference here, but has to be one of CUDA's.
inline bool is_cache_config(CUfunc_cache config) {
  return config >= CU_FUNC_CACHE_PREFER_NONE && config <= CU_FUNC_CACHE_PREFER_EQUAL;
}

inline bool is_device(const Machine& machine, CUdevice device) {
  return device >= 0 && device < machine.device_count();
}

}  // namespace spillover::emulator
