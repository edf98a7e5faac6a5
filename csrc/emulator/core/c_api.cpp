// The emulator's own C interface (c_api.h, kernel_api.h). Before cuInit, and in a process that was
// forked after it, the functions do nothing and touch no lock.
#include "emulator/core/c_api.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>
#include <vector>

#include "emulator/core/call_site.hpp"
#include "emulator/core/config.hpp"
#include "emulator/core/fault_api.h"
#include "emulator/core/hazard_checker.hpp"
#include "emulator/core/hazard_text.hpp"
#include "emulator/core/kernel_api.h"
#include "emulator/core/kernels.hpp"
#include "emulator/core/machine.hpp"
#include "emulator/core/process.hpp"

namespace emulator = spillover::emulator;
using emulator::AccessKind;
using emulator::Address;
using emulator::Lock;
using emulator::Machine;
using emulator::Recording;
using emulator::StreamRef;

namespace {

// The machine, where there is anything to check; nullptr otherwise.
Machine* checking_machine() {
  if (!emulator::process_ready()) return nullptr;
  Machine& machine = Machine::instance();
  return machine.hazards.enabled() ? &machine : nullptr;
}

std::atomic<bool> follows_blocks{false};

// Follows an allocator's blocks over virtual time.
void note_block(std::int64_t bytes) {
  if (!emulator::process_ready() || !Machine::instance().clock.enabled()) return;
  const Lock lock(Machine::instance().mutex);
  Machine::instance().clock.note_block(bytes);
}

size_t copy_text(const std::string& text, char* out, size_t capacity) {
  if (out != nullptr && capacity > 0) {
    const std::size_t length = std::min(text.size(), capacity - 1);
    std::memcpy(out, text.data(), length);
    out[length] = '\0';
  }
  return text.size();
}

// The stream that a handle means; a default stream where no context is current is device 0's, since
// torch's threads may come here before they made a call of the runtime's.
CUresult find_stream(Machine& machine, void* handle, StreamRef* stream) {
  const CUresult result = machine.streams.find(static_cast<CUstream>(handle), stream);
  if (result != CUDA_ERROR_INVALID_CONTEXT) return result;
  *stream = machine.streams.legacy(0);
  return CUDA_SUCCESS;
}

AccessKind kind_of(const spillover_emulator_range& range) {
  return range.is_write != 0 ? AccessKind::kWrite : AccessKind::kRead;
}

// An operator or a kernel of a test counts as the launch that it would be on a GPU. A launch has no
// work to do before it fails.
int observe_launch() {
  if (__atomic_load_n(&spillover_emulator_observes_calls, __ATOMIC_RELAXED) == 0) return 0;
  int late = CUDA_SUCCESS;
  const int at_once = spillover_emulator_observe_call("cuLaunchKernel", &late);
  return at_once != CUDA_SUCCESS ? at_once : late;
}

bool is_tracked(const Machine& machine, const spillover_emulator_range& range) {
  const auto address = reinterpret_cast<Address>(range.pointer);
  return range.size_bytes != 0 && machine.is_device_accessible(address, range.size_bytes);
}

// Checks and records all ranges. Under the policy "raise" the caller does not perform what is
// hazardous, so none of it is recorded then.
int access_all(Machine& machine, const emulator::Access& access, const emulator::VectorClock& clock,
               const spillover_emulator_range* ranges, std::size_t count) {
  const auto visit_all = [&](Recording recording) {
    bool found = false;
    for (std::size_t i = 0; i < count; ++i) {
      if (!is_tracked(machine, ranges[i])) continue;
      found = machine.record(access, clock, kind_of(ranges[i]),
                             reinterpret_cast<Address>(ranges[i].pointer), ranges[i].size_bytes,
                             recording) ||
              found;
    }
    return found;
  };
  if (!machine.hazards.raises()) {
    visit_all(Recording::kYes);
    return CUDA_SUCCESS;
  }
  if (visit_all(Recording::kNo)) return SPILLOVER_EMULATOR_HAZARD;
  visit_all(Recording::kYes);
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

void* spillover_emulator_host_pointer(const void* pointer) {
  const auto address = reinterpret_cast<Address>(pointer);
  if (emulator::process_state() == emulator::ProcessState::kFresh) {
    return reinterpret_cast<void*>(address);
  }
  return reinterpret_cast<void*>(Machine::instance().addresses.to_host(address));
}

int spillover_emulator_operator_begin(void* stream, const char* name,
                                      const spillover_emulator_range* ranges, size_t range_count) {
  if (!emulator::process_ready()) return CUDA_ERROR_NOT_INITIALIZED;
  // Its stream waits for the callback, which would wait for its stream.
  if (emulator::in_callback()) return CUDA_ERROR_NOT_PERMITTED;
  const int injected = observe_launch();
  if (injected != CUDA_SUCCESS) return injected;
  Machine& machine = Machine::instance();
  const emulator::ReportScope reports;
  const emulator::CallScope call("operator");
  Lock lock(machine.mutex);
  machine.scheduler.perturb(lock);
  StreamRef target;
  CUresult result = find_stream(machine, stream, &target);
  if (result == CUDA_SUCCESS) result = machine.captures.admit_work(target);
  // An operator that got here runs now, which captured work does not.
  if (result == CUDA_SUCCESS && target->capture != nullptr) {
    result = machine.captures.admit_wait(target);
  }
  if (result != CUDA_SUCCESS) return result;
  try {
    machine.streams.perform(lock, target);
  } catch (const emulator::WaitTimedOut&) {
    return CUDA_ERROR_TIMEOUT;
  }
  const CUresult error = machine.sticky_error(target->device);
  if (error != CUDA_SUCCESS || !machine.hazards.enabled()) return error;
  for (size_t i = 0; i < range_count; ++i) {
    // Whatever the policy: the operator would crash on such memory.
    if (!machine.check_usable(*target, name, kind_of(ranges[i]),
                              reinterpret_cast<Address>(ranges[i].pointer), ranges[i].size_bytes)) {
      return SPILLOVER_EMULATOR_HAZARD;
    }
  }
  const emulator::Access access = machine.access_of(*target, target->enqueued, name);
  return access_all(machine, access, target->clock, ranges, range_count);
}

int spillover_emulator_is_capturing(void* stream) {
  if (!emulator::process_ready()) return 0;
  Machine& machine = Machine::instance();
  const Lock lock(machine.mutex);
  StreamRef target;
  if (find_stream(machine, stream, &target) != CUDA_SUCCESS || target->capture == nullptr) return 0;
  return target->capture->capture->is_valid ? 1 : 2;
}

void* spillover_emulator_capture_pointer(void* stream, const void* pointer, size_t size_bytes,
                                         int is_write) {
  if (!emulator::process_ready()) return nullptr;
  Machine& machine = Machine::instance();
  const Lock lock(machine.mutex);
  StreamRef target;
  if (find_stream(machine, stream, &target) != CUDA_SUCCESS || target->capture == nullptr) {
    return nullptr;
  }
  emulator::CaptureMemory& memory = target->capture->capture->memory;
  const auto address = reinterpret_cast<Address>(pointer);
  return is_write != 0 ? memory.write(address, size_bytes)
                       : const_cast<std::byte*>(memory.read(address, size_bytes));
}

int spillover_emulator_capture_kernel(void* stream, const char* name,
                                      int (*run)(void* argument, char* error, size_t capacity),
                                      void* argument, void (*release)(void* argument),
                                      const spillover_emulator_range* ranges, size_t range_count,
                                      uint64_t duration_ns, uint64_t device_bytes, int limit) {
  emulator::KernelBody body;
  body.run = run;
  body.argument = argument;
  body.release = release;
  body.cost.resource = emulator::Resource::kCompute;
  body.cost.limit = static_cast<emulator::KernelLimit>(limit);
  body.cost.duration = static_cast<std::int64_t>(duration_ns);
  body.cost.device_bytes = device_bytes;
  for (size_t i = 0; i < range_count; ++i) {
    body.accesses.push_back({reinterpret_cast<Address>(ranges[i].pointer), ranges[i].size_bytes,
                             ranges[i].is_write != 0});
  }
  if (!emulator::process_ready()) return CUDA_ERROR_NOT_INITIALIZED;
  const int injected = observe_launch();
  if (injected != CUDA_SUCCESS) return injected;
  Machine& machine = Machine::instance();
  const Lock lock(machine.mutex);
  StreamRef target;
  CUresult result = find_stream(machine, stream, &target);
  if (result == CUDA_SUCCESS) result = machine.captures.admit_work(target);
  if (result != CUDA_SUCCESS) return result;
  if (target->capture == nullptr) return CUDA_ERROR_ILLEGAL_STATE;
  if (machine.clock.enabled()) {
    machine.clock.advance(machine.clock.profile().microseconds("host.operator_us"));
  }
  machine.captures.add(target, machine.hazards.intern(name),
                       std::make_shared<const emulator::KernelBody>(std::move(body)));
  return CUDA_SUCCESS;
}

int spillover_emulator_host_access(const char* name, const spillover_emulator_range* ranges,
                                   size_t range_count) {
  if (!emulator::process_ready()) return CUDA_SUCCESS;
  Machine& machine = Machine::instance();
  // What a host function touches is ordered with its stream, which knows nothing of it.
  if (!machine.hazards.enabled() || emulator::in_callback()) return CUDA_SUCCESS;
  const emulator::ReportScope reports;
  {
    const Lock lock(machine.mutex);
    const auto tracked = [&](const auto& range) { return is_tracked(machine, range); };
    if (std::none_of(ranges, ranges + range_count, tracked)) return CUDA_SUCCESS;
  }
  const emulator::CallScope call(name);
  const Lock lock(machine.mutex);
  return access_all(machine, machine.host_access_of(name),
                    machine.streams.threads().current().clock, ranges, range_count);
}

size_t spillover_emulator_pinned_count(void) {
  if (!emulator::process_ready()) return 0;
  Machine& machine = Machine::instance();
  const Lock lock(machine.mutex);
  return machine.host_memory.regions().size();
}

int spillover_emulator_hazards_enabled(void) {
  return emulator::process_state() != emulator::ProcessState::kForked &&
         emulator::config().hazards != emulator::HazardPolicy::kOff;
}

size_t spillover_emulator_hazard_count(void) {
  if (!emulator::process_ready()) return 0;
  Machine& machine = Machine::instance();
  const Lock lock(machine.mutex);
  return machine.hazards.count();
}

size_t spillover_emulator_hazard_text(size_t index, char* out, size_t capacity) {
  if (out != nullptr && capacity > 0) *out = '\0';
  if (!emulator::process_ready()) return 0;
  Machine& machine = Machine::instance();
  const Lock lock(machine.mutex);
  if (index >= machine.hazards.text_count()) return 0;
  return copy_text(machine.hazards.text(index), out, capacity);
}

size_t spillover_emulator_leak_text(size_t index, char* out, size_t capacity) {
  if (out != nullptr && capacity > 0) *out = '\0';
  Machine* const machine = checking_machine();
  if (machine == nullptr) return 0;
  const Lock lock(machine->mutex);
  const std::vector<std::string> texts = machine->hazards.history().live_texts();
  return index < texts.size() ? copy_text(texts[index], out, capacity) : 0;
}

void spillover_emulator_thread_begin(void) {
  emulator::HostThreads::begin();
}

void spillover_emulator_thread_end(void) {
  emulator::HostThreads::end();
}

void spillover_emulator_release(uint64_t token) {
  Machine* const machine = checking_machine();
  if (machine == nullptr) return;
  const Lock lock(machine->mutex);
  machine->streams.threads().release(token);
}

void spillover_emulator_acquire(uint64_t token) {
  Machine* const machine = checking_machine();
  if (machine == nullptr) return;
  const Lock lock(machine->mutex);
  machine->streams.threads().acquire(token);
}

void spillover_emulator_forget(uint64_t token) {
  Machine* const machine = checking_machine();
  if (machine == nullptr) return;
  const Lock lock(machine->mutex);
  machine->streams.threads().forget(token);
}

void spillover_emulator_block_begin(const void* pointer, size_t size_bytes, uint64_t pool) {
  note_block(static_cast<std::int64_t>(size_bytes));
  Machine* const machine = checking_machine();
  if (machine == nullptr) return;
  const emulator::CallScope call("allocator");
  const Lock lock(machine->mutex);
  machine->hazards.blocks().begin(
      reinterpret_cast<Address>(pointer), size_bytes, machine->hazards.next_order(),
      emulator::current_site(), {pool, machine->captures.any()},
      [&](const emulator::VectorClock& clock) { machine->streams.host_learns(clock); });
}

void spillover_emulator_block_end(const void* pointer, size_t size_bytes) {
  note_block(-static_cast<std::int64_t>(size_bytes));
  Machine* const machine = checking_machine();
  if (machine == nullptr) return;
  const emulator::CallScope call("allocator");
  const Lock lock(machine->mutex);
  machine->hazards.blocks().end(reinterpret_cast<Address>(pointer), size_bytes,
                                emulator::current_site(), machine->streams.threads().snapshot());
}

void spillover_emulator_follow_blocks(void) {
  follows_blocks.store(true, std::memory_order_relaxed);
}

int spillover_emulator_follows_blocks(void) {
  return follows_blocks.load(std::memory_order_relaxed) ? 1 : 0;
}

void spillover_emulator_set_stacks(uint32_t (*capture)(void),
                                   size_t (*format)(uint32_t site, char* out, size_t capacity)) {
  emulator::set_stack_functions(capture, format);
}

void spillover_emulator_set_operand_describer(size_t (*describer)(const void* address,
                                                                  size_t size_bytes, void* context,
                                                                  char* out, size_t capacity),
                                              void* context) {
  emulator::set_argument_describer(describer, context);
}

void spillover_emulator_hazards_clear(void) {
  if (!emulator::process_ready()) return;
  Machine& machine = Machine::instance();
  const Lock lock(machine.mutex);
  machine.hazards.clear_reports();
}

const char* spillover_emulator_last_hazard(void) {
  return emulator::last_hazard();
}

int spillover_emulator_launch(void* stream, const char* name, void (*body)(void*), void* argument) {
  if (!emulator::process_ready()) return CUDA_ERROR_NOT_INITIALIZED;
  if (body == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (emulator::in_callback()) return CUDA_ERROR_NOT_PERMITTED;
  const int injected = observe_launch();
  if (injected != CUDA_SUCCESS) return injected;
  Machine& machine = Machine::instance();
  const emulator::ReportScope reports;
  Lock lock(machine.mutex);
  machine.scheduler.perturb(lock);
  StreamRef target;
  CUresult result = find_stream(machine, stream, &target);
  if (result == CUDA_SUCCESS) result = machine.captures.admit_work(target);
  if (result != CUDA_SUCCESS) return result;
  if (target->capture != nullptr) {
    emulator::KernelBody kernel = emulator::repeated(body, argument);
    machine.captures.add(target, machine.hazards.intern(name == nullptr ? "kernel" : name),
                         std::make_shared<const emulator::KernelBody>(std::move(kernel)));
    return CUDA_SUCCESS;
  }
  machine.streams.prepare(target);
  emulator::Operation operation;
  operation.body = emulator::Kernel{body, argument};
  operation.name = machine.hazards.intern(name == nullptr ? "kernel" : name);
  machine.streams.submit(lock, target, std::move(operation));
  return machine.sticky_error(target->device);
}

void spillover_emulator_live(size_t* device_bytes, size_t* device_allocations, size_t* pinned_bytes,
                             size_t* pinned_regions, size_t* streams, size_t* events) {
  std::size_t values[6] = {};
  if (emulator::process_ready()) {
    Machine& machine = Machine::instance();
    const Lock lock(machine.mutex);
    for (int device = 0; device < machine.device_count(); ++device) {
      values[0] += machine.budget.used_bytes(device);
    }
    values[1] = machine.device_memory.allocations().size() +
                machine.virtual_memory.physical_count() + machine.virtual_memory.mapping_count();
    for (const auto& [address, region] : machine.host_memory.regions()) {
      values[2] += region.size_bytes;
    }
    values[3] = machine.host_memory.regions().size();
    values[4] = machine.streams.live_count();
    values[5] = machine.events.live_count();
  }
  std::size_t* const outputs[6] = {
      device_bytes, device_allocations, pinned_bytes, pinned_regions, streams, events};
  for (std::size_t i = 0; i < 6; ++i) {
    if (outputs[i] != nullptr) *outputs[i] = values[i];
  }
}

size_t spillover_emulator_peak_bytes(int device) {
  if (!emulator::process_ready()) return 0;
  Machine& machine = Machine::instance();
  const Lock lock(machine.mutex);
  if (device < 0 || device >= machine.device_count()) return 0;
  return machine.budget.peak_bytes(device);
}

const char* spillover_emulator_config(void) {
  return emulator::config().description.c_str();
}

int spillover_emulator_configure(void) {
  if (emulator::process_state() != emulator::ProcessState::kFresh) return 0;
  emulator::read_config_again();
  return 1;
}

int spillover_emulator_register_kernel(const char* name, spillover_emulator_kernel_body body,
                                       void* user, const size_t* parameter_bytes,
                                       size_t parameter_count) {
  if (name == nullptr || body == nullptr || (parameter_bytes == nullptr && parameter_count != 0)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (!emulator::process_ready()) return CUDA_ERROR_NOT_INITIALIZED;
  Machine& machine = Machine::instance();
  const Lock lock(machine.mutex);
  machine.kernels.add({.name = name,
                       .body = body,
                       .user = user,
                       .parameter_bytes = {parameter_bytes, parameter_bytes + parameter_count}});
  return CUDA_SUCCESS;
}

int spillover_emulator_declare_accesses(const char* name,
                                        spillover_emulator_kernel_accesses accesses, void* user) {
  if (name == nullptr || accesses == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (!emulator::process_ready()) return CUDA_ERROR_NOT_INITIALIZED;
  Machine& machine = Machine::instance();
  const Lock lock(machine.mutex);
  return machine.kernels.declare(name, accesses, user) ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

}  // extern "C"
