// The C interface of injected faults (fault_api.h).
#include "emulator/core/fault_api.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "emulator/core/context.hpp"
#include "emulator/core/fault_plan.hpp"
#include "emulator/core/machine.hpp"
#include "emulator/core/process.hpp"
#include "emulator/core/status.hpp"

namespace emulator = spillover::emulator;
using emulator::Context;
using emulator::FaultPlan;
using emulator::Lock;
using emulator::Machine;
using emulator::StreamRef;

namespace {

bool is_forked() {
  return emulator::process_state() == emulator::ProcessState::kForked;
}

// Copies text out as the other functions of the C interface do; returns its full length.
std::size_t copy_text(const std::string& text, char* out, std::size_t capacity) {
  if (out != nullptr && capacity > 0) {
    const std::size_t length = std::min(text.size(), capacity - 1);
    std::memcpy(out, text.data(), length);
    out[length] = '\0';
  }
  return text.size();
}

// body(Machine&, Lock&) -> CUresult
template <typename Body>
int with_machine(Body&& body) {
  if (!emulator::process_ready()) return CUDA_ERROR_NOT_INITIALIZED;
  Machine& machine = Machine::instance();
  Lock lock(machine.mutex);
  return body(machine, lock);
}

void make_sticky(CUresult error) {
  if (!emulator::process_ready()) return;
  const Context* context = emulator::CurrentContext::get();
  Machine& machine = Machine::instance();
  const Lock lock(machine.mutex);
  machine.sticky_error(context == nullptr ? 0 : context->device) = error;
}

}  // namespace

extern "C" {

int spillover_emulator_observes_calls = 0;

void spillover_emulator_plan_begin(const spillover_emulator_fault* faults, size_t count,
                                   uint64_t seed) {
  if (is_forked()) return;
  std::vector<FaultPlan::Rule> rules;
  for (std::size_t i = 0; i < count; ++i) {
    const spillover_emulator_fault& fault = faults[i];
    rules.push_back({fault.function, fault.first_call, fault.times, fault.probability,
                     static_cast<CUresult>(fault.error), fault.timing});
  }
  FaultPlan::instance().begin(std::move(rules), seed);
  __atomic_store_n(&spillover_emulator_observes_calls, 1, __ATOMIC_RELEASE);
}

void spillover_emulator_plan_end(void) {
  __atomic_store_n(&spillover_emulator_observes_calls, 0, __ATOMIC_RELEASE);
  if (!is_forked()) FaultPlan::instance().end();
}

int spillover_emulator_observe_call(const char* name, int* late) {
  *late = CUDA_SUCCESS;
  if (is_forked()) return CUDA_SUCCESS;
  const FaultPlan::Verdict verdict = FaultPlan::instance().observe(name);
  for (const CUresult error : {verdict.at_once, verdict.late}) {
    if (emulator::is_sticky_error(error)) make_sticky(error);
  }
  *late = verdict.late;
  return verdict.at_once;
}

int spillover_emulator_device_is_broken(void) {
  if (!emulator::process_ready()) return 0;
  Machine& machine = Machine::instance();
  const Lock lock(machine.mutex);
  for (int device = 0; device < machine.device_count(); ++device) {
    if (machine.sticky_error(device) != CUDA_SUCCESS) return 1;
  }
  return 0;
}

size_t spillover_emulator_call_counts(char* out, size_t capacity) {
  return copy_text(is_forked() ? "" : FaultPlan::instance().counts(), out, capacity);
}

size_t spillover_emulator_call_bytes(char* out, size_t capacity) {
  return copy_text(is_forked() ? "" : FaultPlan::instance().bytes(), out, capacity);
}

size_t spillover_emulator_faults_fired(char* out, size_t capacity) {
  return copy_text(is_forked() ? "" : FaultPlan::instance().fired(), out, capacity);
}

size_t spillover_emulator_error_names(char* out, size_t capacity) {
  std::string text;
  for (int number = 1; number <= CUDA_ERROR_UNKNOWN; ++number) {
    const char* name = emulator::status_name(static_cast<CUresult>(number));
    if (name != nullptr) text += std::string(name) + " " + std::to_string(number) + "\n";
  }
  return copy_text(text, out, capacity);
}

int spillover_emulator_occupy(int device, size_t size_bytes) {
  return with_machine([=](Machine& machine, Lock&) {
    if (device < 0 || device >= machine.device_count()) return CUDA_ERROR_INVALID_DEVICE;
    machine.budget.occupy(device, size_bytes);
    return CUDA_SUCCESS;
  });
}

int spillover_emulator_limit_pinned(size_t size_bytes) {
  return with_machine([=](Machine& machine, Lock&) {
    machine.host_memory.limit_pinned(size_bytes);
    return CUDA_SUCCESS;
  });
}

int spillover_emulator_slow_stream(void* handle, unsigned delay_us) {
  return with_machine([=](Machine& machine, Lock&) {
    StreamRef stream;
    const CUresult found = machine.streams.find(static_cast<CUstream>(handle), &stream);
    if (found == CUDA_SUCCESS) stream->delay_us = delay_us;
    return found;
  });
}

int spillover_emulator_hold_stream(void* handle, unsigned timeout_ms, uint64_t* id) {
  return with_machine([=](Machine& machine, Lock& lock) {
    StreamRef stream;
    const CUresult found = machine.streams.find(static_cast<CUstream>(handle), &stream);
    if (found != CUDA_SUCCESS) return found;
    *id = machine.scheduler.add_hold(std::chrono::milliseconds(timeout_ms));
    machine.streams.prepare(stream);
    emulator::Operation operation;
    operation.body = emulator::Hold{*id};
    operation.name = "hold";
    machine.streams.submit(lock, stream, std::move(operation));
    return CUDA_SUCCESS;
  });
}

int spillover_emulator_release_stream(uint64_t id) {
  return with_machine([=](Machine& machine, Lock& lock) {
    return machine.scheduler.release_hold(lock, id) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
  });
}

}  // extern "C"
