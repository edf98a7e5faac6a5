// The C interface of dry runs (dry_api.h). Before cuInit nothing is unknown on the host.
#include "emulator/core/dry_api.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "emulator/core/call_site.hpp"
#include "emulator/core/config.hpp"
#include "emulator/core/known_bytes.hpp"
#include "emulator/core/machine.hpp"
#include "emulator/core/process.hpp"

namespace emulator = spillover::emulator;
using emulator::Address;
using emulator::Machine;

extern "C" {

int spillover_emulator_is_dry(void) {
  return emulator::config().dry ? 1 : 0;
}

int spillover_emulator_unknown_policy(void) {
  return static_cast<int>(emulator::config().unknown);
}

double spillover_emulator_routing(void) {
  return emulator::config().routing;
}

size_t spillover_emulator_known_bytes_max(void) {
  return emulator::KnownBytes::kRunBytesMax;
}

int spillover_emulator_is_device_byte(const void* pointer) {
  if (!emulator::process_ready()) return 0;
  const emulator::AddressSpace& addresses = Machine::instance().addresses;
  return addresses.contains(addresses.from_host(reinterpret_cast<Address>(pointer))) ? 1 : 0;
}

int spillover_emulator_is_known(const void* pointer, size_t size_bytes) {
  if (!emulator::process_ready()) return 1;
  return Machine::instance().known.is_known(reinterpret_cast<Address>(pointer), size_bytes) ? 1 : 0;
}

void spillover_emulator_set_known(const void* pointer, size_t size_bytes, int is_known) {
  if (!emulator::process_ready()) return;
  Machine::instance().known.set(reinterpret_cast<Address>(pointer), size_bytes, is_known != 0);
}

int spillover_emulator_is_pinned(const void* pointer, size_t size_bytes) {
  if (!emulator::process_ready()) return 0;
  Machine& machine = Machine::instance();
  const emulator::Lock lock(machine.mutex);
  return machine.host_memory.covers(reinterpret_cast<Address>(pointer), size_bytes) ? 1 : 0;
}

int spillover_emulator_host_phantom(const spillover_emulator_range* ranges, size_t count) {
  if (!emulator::config().dry || !emulator::process_ready()) return 0;
  Machine& machine = Machine::instance();
  bool is_phantom = false;
  for (size_t i = 0; i < count && !is_phantom; ++i) {
    const auto address = reinterpret_cast<Address>(ranges[i].pointer);
    const size_t size_bytes = ranges[i].size_bytes;
    if (ranges[i].is_write == 0) {
      is_phantom = !machine.known.is_known(address, size_bytes);
    } else if (size_bytes > emulator::KnownBytes::kRunBytesMax) {
      const emulator::Lock lock(machine.mutex);
      is_phantom = machine.host_memory.covers(address, size_bytes);
    }
  }
  for (size_t i = 0; i < count; ++i) {
    if (ranges[i].is_write == 0) continue;
    machine.known.set(reinterpret_cast<Address>(ranges[i].pointer), ranges[i].size_bytes,
                      !is_phantom);
  }
  return is_phantom ? 1 : 0;
}

size_t spillover_emulator_unknown_host_runs(void) {
  return emulator::process_ready() ? Machine::instance().known.unknown_host_runs() : 0;
}

unsigned spillover_emulator_take_site(void) {
  return emulator::take_site();
}

size_t spillover_emulator_describe_site(unsigned site, char* out, size_t capacity) {
  std::string text = emulator::describe_site(site, "");
  if (!text.empty()) text.erase(0, 1);  // each line begins with a line feed
  if (out != nullptr && capacity > 0) {
    const size_t length = std::min(text.size(), capacity - 1);
    std::memcpy(out, text.data(), length);
    out[length] = '\0';
  }
  return text.size();
}

}  // extern "C"
