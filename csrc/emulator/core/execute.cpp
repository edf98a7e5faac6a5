#include "emulator/core/execute.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>
#include <type_traits>

#include "emulator/core/config.hpp"
#include "emulator/core/machine.hpp"
#include "emulator/core/phantom.hpp"
#include "emulator/core/process.hpp"
#include "emulator/core/shared_mark.hpp"

namespace spillover::emulator {
namespace {

// True when the bytes can be touched; otherwise the device has a sticky error from here on.
bool check_range(Machine& machine, const Stream& stream, const Operation& operation,
                 Address address, std::size_t size_bytes, bool is_write) {
  if (machine.is_live(address, size_bytes, is_write)) return true;
  report(
      "illegal address: %s of %zu bytes at 0x%zx by %s on stream %llu (operation %llu): the memory "
      "was freed or unmapped between the call and the operation's turn; wait for the stream before "
      "freeing it",
      is_write ? "write" : "read", size_bytes, address, operation.name,
      static_cast<unsigned long long>(stream.id),
      static_cast<unsigned long long>(stream.completed + 1));
  machine.sticky_error(stream.device) = CUDA_ERROR_ILLEGAL_ADDRESS;
  return false;
}

std::byte* bytes_at(const Machine& machine, Address address) {
  return reinterpret_cast<std::byte*>(machine.addresses.to_host(address));
}

void delay() {
  const int microseconds = config().copy_delay_us;
  if (microseconds > 0) std::this_thread::sleep_for(std::chrono::microseconds(microseconds));
}

void perform(Machine& machine, Copy& copy) {
  delay();
  if (machine.config.dry) return perform_phantom(machine, copy);
  std::byte* destination = bytes_at(machine, copy.destination);
  const std::byte* source =
      copy.staged != nullptr ? copy.staged.get() : bytes_at(machine, copy.source);
  const std::size_t source_pitch = copy.staged != nullptr ? copy.width_bytes : copy.source_pitch;
  for (std::size_t row = 0; row < copy.height; ++row) {
    // The ranges may overlap where the program copies within one buffer.
    std::memmove(destination + row * copy.destination_pitch, source + row * source_pitch,
                 copy.width_bytes);
  }
}

template <typename Element>
void fill_row(std::byte* row, std::size_t count, std::uint32_t value) {
  const auto element = static_cast<Element>(value);
  for (std::size_t i = 0; i < count; ++i) {
    std::memcpy(row + i * sizeof(Element), &element, sizeof(Element));
  }
}

void perform(Machine& machine, const Fill& fill) {
  delay();
  if (machine.config.dry) return perform_phantom(machine, fill);
  std::byte* row = bytes_at(machine, fill.destination);
  for (std::size_t y = 0; y < fill.height; ++y, row += fill.pitch) fill_bytes(row, fill);
}

void perform(Machine& machine, const Kernel& kernel) {
  const CallbackScope scope;
  if (machine.config.dry) return perform_phantom(machine, kernel);
  kernel.body(kernel.argument);
}

// A kernel that failed leaves the device unusable, as an assertion in a GPU's kernel does.
void perform_shared(Machine& machine, const Stream& stream, Operation& operation) {
  // Without the mutex: what it holds may be the last of a graph.
  const std::shared_ptr<const KernelBody> kernel =
      std::move(std::get<SharedKernel>(operation.body).body);
  const KernelBody& body = *kernel;
  char error[1024] = "";
  int result = CUDA_SUCCESS;
  {
    const CallbackScope scope;
    result = body.run(body.argument, error, sizeof error);
  }
  if (result == CUDA_SUCCESS) return;
  report("%s failed: %s", operation.name, error);
  const Lock lock(machine.mutex);
  machine.sticky_error(stream.device) = static_cast<CUresult>(result);
}

void perform(Machine&, const HostFunction& function) {
  const CallbackScope scope;
  function.body(function.argument);
}

template <typename Other>
void perform(Machine&, const Other&) {}

std::uint64_t load(const Machine& machine, Address address, unsigned size_bytes) {
  const std::byte* place = bytes_at(machine, address);
  if (size_bytes == 8) {
    return __atomic_load_n(reinterpret_cast<const std::uint64_t*>(place), __ATOMIC_ACQUIRE);
  }
  return __atomic_load_n(reinterpret_cast<const std::uint32_t*>(place), __ATOMIC_ACQUIRE);
}

void store(const Machine& machine, const WriteValue& write) {
  std::byte* place = bytes_at(machine, write.address);
  if (write.size_bytes == 8) {
    __atomic_store_n(reinterpret_cast<std::uint64_t*>(place), write.value, __ATOMIC_RELEASE);
  } else {
    __atomic_store_n(reinterpret_cast<std::uint32_t*>(place),
                     static_cast<std::uint32_t>(write.value), __ATOMIC_RELEASE);
  }
}

}  // namespace

void fill_bytes(std::byte* row, const Fill& fill) {
  if (fill.element_bytes == 1) {
    std::memset(row, static_cast<int>(fill.value & 0xFF), fill.width_elements);
  } else if (fill.element_bytes == 2) {
    fill_row<std::uint16_t>(row, fill.width_elements, fill.value);
  } else {
    fill_row<std::uint32_t>(row, fill.width_elements, fill.value);
  }
}

bool begin_operation(Machine& machine, const Stream& stream, Operation& operation) {
  const auto check = [&](Address address, std::size_t size_bytes, bool is_write) {
    return check_range(machine, stream, operation, address, size_bytes, is_write);
  };
  if (const auto* copy = std::get_if<Copy>(&operation.body)) {
    return check(copy->destination, copy->destination_bytes(), true) &&
           (copy->staged != nullptr || check(copy->source, copy->source_bytes(), false));
  }
  if (const auto* fill = std::get_if<Fill>(&operation.body)) {
    return check(fill->destination, fill->destination_bytes(), true);
  }
  if (const auto* write = std::get_if<WriteValue>(&operation.body)) {
    if (check(write->address, write->size_bytes, true)) store(machine, *write);
    return false;
  }
  if (const auto* wait = std::get_if<WaitValue>(&operation.body)) {
    check(wait->address, wait->size_bytes, false);
    return false;
  }
  if (const auto* publish = std::get_if<PublishRecord>(&operation.body)) {
    publish->mark->publish(publish->record);
    return false;
  }
  if (const auto* record = std::get_if<RecordTime>(&operation.body)) {
    *record->time = std::chrono::steady_clock::now();
    return false;
  }
  if (const auto* free = std::get_if<FreeMemory>(&operation.body)) {
    --machine.pending_frees;
    machine.release_allocation(free->address);
    return false;
  }
  if (const auto* function = std::get_if<HostFunction>(&operation.body)) {
    // It tells other threads of it by means that nobody sees.
    machine.streams.all_learn(function->clock);
    return true;
  }
  const auto can_run = [&](const std::vector<KernelAccess>& accesses) {
    return std::all_of(accesses.begin(), accesses.end(), [&](const KernelAccess& access) {
      return check(access.address, access.size_bytes, access.is_write);
    });
  };
  if (const auto* kernel = std::get_if<SharedKernel>(&operation.body)) {
    return can_run(kernel->body->accesses);
  }
  const auto* kernel = std::get_if<Kernel>(&operation.body);
  // Its argument is lost with a kernel that cannot run, once, since the device is lost too.
  return kernel != nullptr && can_run(kernel->accesses);
}

void perform_operation(Machine& machine, const Stream& stream, Operation& operation) {
  if (std::holds_alternative<SharedKernel>(operation.body)) {
    perform_shared(machine, stream, operation);
    return;
  }
  std::visit([&](auto& body) { perform(machine, body); }, operation.body);
}

bool value_matches(Machine& machine, const WaitValue& wait) {
  if (wait.mark != nullptr) return wait.mark->reached(wait.value);
  if (!machine.is_live(wait.address, wait.size_bytes, /*is_write=*/false)) return true;
  const std::uint64_t value = load(machine, wait.address, wait.size_bytes);
  const std::uint64_t difference = value - wait.value;
  switch (wait.flags & 0x3U) {
    case CU_STREAM_WAIT_VALUE_GEQ:  // cyclic, as CUDA defines it
      return wait.size_bytes == 8 ? static_cast<std::int64_t>(difference) >= 0
                                  : static_cast<std::int32_t>(difference) >= 0;
    case CU_STREAM_WAIT_VALUE_EQ:
      return value == wait.value;
    case CU_STREAM_WAIT_VALUE_AND:
      return (value & wait.value) != 0;
    default: {  // CU_STREAM_WAIT_VALUE_NOR
      const std::uint64_t nor = ~(value | wait.value);
      return wait.size_bytes == 8 ? nor != 0 : static_cast<std::uint32_t>(nor) != 0;
    }
  }
}

}  // namespace spillover::emulator
