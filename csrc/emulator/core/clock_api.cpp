#include "emulator/core/clock_api.h"

#include <cerrno>
#include <cstring>
#include <string>

#include "emulator/core/call_site.hpp"
#include "emulator/core/config.hpp"
#include "emulator/core/machine.hpp"
#include "emulator/core/process.hpp"
#include "emulator/core/report.hpp"

namespace emulator = spillover::emulator;
using emulator::HostTurns;
using emulator::Lock;
using emulator::Machine;
using emulator::StreamRef;

namespace {

// The machine, where its clock is on; nullptr otherwise.
Machine* clocked_machine() {
  if (!emulator::process_ready()) return nullptr;
  Machine& machine = Machine::instance();
  return machine.clock.enabled() ? &machine : nullptr;
}

// Without out makes a new text, with a buffer copies the latest one there; its length.
template <typename Function>
size_t hand_out(char* out, size_t capacity, Function&& make) {
  if (out != nullptr && capacity > 0) *out = '\0';
  Machine* const machine = clocked_machine();
  if (machine == nullptr) return 0;
  Lock lock(machine->mutex);
  static std::string& text = *new std::string;  // guarded by the machine's mutex
  if (out == nullptr) text = make(machine, lock);
  if (out != nullptr && capacity > 0) {
    const std::size_t length = std::min(text.size(), capacity - 1);
    std::memcpy(out, text.data(), length);
    out[length] = '\0';
  }
  return text.size();
}

}  // namespace

extern "C" {

int spillover_emulator_clock_enabled(void) {
  return emulator::process_state() != emulator::ProcessState::kForked && emulator::config().clock;
}

double spillover_emulator_profile(const char* key) {
  return emulator::config().profile.at(key);
}

void spillover_emulator_kernel(void* stream, const char* name, uint64_t duration_ns,
                               uint64_t device_bytes, spillover_emulator_limit limit) {
  Machine* const machine = clocked_machine();
  if (machine == nullptr || emulator::in_callback()) return;
  const emulator::ReportScope reports;
  const emulator::CallScope call("operator", 0);
  Lock lock(machine->mutex);
  StreamRef target;
  if (machine->streams.find(static_cast<CUstream>(stream), &target) != CUDA_SUCCESS) {
    target = machine->streams.legacy(0);
  }
  try {
    machine->streams.perform(lock, target);
  } catch (const emulator::WaitTimedOut&) {
    return;  // the operator's next call says so
  }
  machine->clock.advance(machine->clock.profile().microseconds("host.operator_us"));
  emulator::OperationCost cost;
  cost.resource = emulator::Resource::kCompute;
  cost.limit = static_cast<emulator::KernelLimit>(limit);
  cost.duration = static_cast<emulator::Nanoseconds>(duration_ns);
  cost.device_bytes = device_bytes;
  machine->clock.append_kernel(target, name, cost);
  machine->clock.throttle(lock, target);
  machine->clock.yield(lock);
}

int64_t spillover_emulator_now(void) {
  return spillover_emulator_clock_enabled() != 0 ? HostTurns::instance().current().now.load() : 0;
}

void spillover_emulator_advance(int64_t duration_ns) {
  // Time begins with the device: what a program sleeps before that depends on the machine it runs
  // on.
  if (clocked_machine() == nullptr || duration_ns < 0) return;
  if (HostTurns::instance().is_detached()) return;
  HostTurns::instance().current().now += duration_ns;
  HostTurns::instance().yield();
}

int spillover_emulator_work(const char* resource, size_t size_bytes, int64_t duration_ns) {
  Machine* const machine = clocked_machine();
  if (machine == nullptr) return CUDA_SUCCESS;
  Lock lock(machine->mutex);
  return machine->clock.work(lock, resource, size_bytes, duration_ns) ? CUDA_SUCCESS
                                                                      : CUDA_ERROR_INVALID_VALUE;
}

void spillover_emulator_host_operator(const char* name, uint64_t size_bytes, int is_optimizer) {
  Machine* const machine = clocked_machine();
  if (machine == nullptr) return;
  Lock lock(machine->mutex);
  machine->clock.host_operator(lock, name, size_bytes, is_optimizer != 0);
}

uint64_t spillover_emulator_work_submit(const char* resource, size_t size_bytes) {
  Machine* const machine = clocked_machine();
  if (machine == nullptr) return 0;
  const Lock lock(machine->mutex);
  return machine->clock.submit_work(resource, size_bytes);
}

void spillover_emulator_work_begin(uint64_t work) {
  Machine* const machine = work == 0 ? nullptr : clocked_machine();
  if (machine == nullptr) return;
  const Lock lock(machine->mutex);
  machine->clock.begin_work(work);
}

void spillover_emulator_work_end(uint64_t work) {
  Machine* const machine = work == 0 ? nullptr : clocked_machine();
  if (machine == nullptr) return;
  const Lock lock(machine->mutex);
  machine->clock.end_work(work);
}

void spillover_emulator_work_wait(uint64_t work) {
  Machine* const machine = work == 0 ? nullptr : clocked_machine();
  if (machine == nullptr) return;
  Lock lock(machine->mutex);
  machine->clock.wait_for_work(lock, work);
}

int spillover_emulator_work_is_done(uint64_t work) {
  Machine* const machine = work == 0 ? nullptr : clocked_machine();
  if (machine == nullptr) return 1;
  Lock lock(machine->mutex);
  return machine->clock.work_has_passed(lock, work) ? 1 : 0;
}

size_t spillover_emulator_clock_report(char* out, size_t capacity) {
  return hand_out(out, capacity,
                  [](Machine* machine, Lock& lock) { return machine->clock.report(lock); });
}

int64_t spillover_emulator_clock_mark(void) {
  Machine* const machine = clocked_machine();
  if (machine == nullptr) return -1;
  const Lock lock(machine->mutex);
  return machine->clock.mark();
}

int64_t spillover_emulator_clock_mark_time(int64_t mark) {
  Machine* const machine = clocked_machine();
  if (machine == nullptr) return 0;
  const Lock lock(machine->mutex);
  return machine->clock.mark_time(mark);
}

size_t spillover_emulator_clock_limits(int64_t from_ns, int64_t to_ns, char* out, size_t capacity) {
  return hand_out(out, capacity,
                  [=](Machine* machine, Lock&) { return machine->clock.limits(from_ns, to_ns); });
}

int spillover_emulator_clock_trace(const char* path) {
  Machine* const machine = clocked_machine();
  if (machine == nullptr) return 0;
  Lock lock(machine->mutex);
  errno = 0;
  if (machine->clock.write_trace(lock, path)) return 0;
  return errno != 0 ? errno : EIO;
}

void spillover_emulator_turn_begin(const char* name) {
  if (spillover_emulator_clock_enabled() != 0) HostTurns::instance().begin(name);
}

uint32_t spillover_emulator_turn_announce(const char* name) {
  return spillover_emulator_clock_enabled() != 0 ? HostTurns::instance().announce(name) : 0;
}

void spillover_emulator_turn_attach(uint32_t thread) {
  if (spillover_emulator_clock_enabled() != 0) HostTurns::instance().attach(thread);
}

void spillover_emulator_turn_end(void) {
  if (spillover_emulator_clock_enabled() != 0) HostTurns::instance().end();
}

void spillover_emulator_turn_cancel(uint32_t thread) {
  if (spillover_emulator_clock_enabled() != 0) HostTurns::instance().cancel(thread);
}

void spillover_emulator_turn_yield(void) {
  if (spillover_emulator_clock_enabled() != 0) HostTurns::instance().yield();
}

int spillover_emulator_turn_block(uint64_t token, int64_t timeout_ns) {
  if (spillover_emulator_clock_enabled() == 0) return 0;
  return static_cast<int>(HostTurns::instance().block(token, timeout_ns));
}

void spillover_emulator_turn_resume(void) {
  if (spillover_emulator_clock_enabled() != 0) HostTurns::instance().resume();
}

void spillover_emulator_turn_wake(uint64_t token) {
  if (spillover_emulator_clock_enabled() != 0) HostTurns::instance().wake(token);
}

void spillover_emulator_set_interpreter(int (*release)(void** state),
                                        void (*restore)(void* state)) {
  HostTurns::instance().set_interpreter(release, restore);
}

}  // extern "C"
