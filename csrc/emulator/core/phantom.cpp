#include "emulator/core/phantom.hpp"

#include <cstring>

#include "emulator/core/execute.hpp"
#include "emulator/core/known_bytes.hpp"
#include "emulator/core/machine.hpp"

namespace spillover::emulator {

void perform_phantom(Machine& machine, const Copy& copy) {
  for (std::size_t row = 0; row < copy.height; ++row) {
    const Address destination = copy.destination + row * copy.destination_pitch;
    if (copy.is_source_dropped) {
      machine.known.set(destination, copy.width_bytes, /*is_known=*/false);
    } else if (copy.staged != nullptr) {
      std::memcpy(reinterpret_cast<void*>(machine.addresses.to_host(destination)),
                  copy.staged.get() + row * copy.width_bytes, copy.width_bytes);
      machine.known.set(destination, copy.width_bytes, /*is_known=*/true);
    } else {
      machine.known.copy(destination, copy.source + row * copy.source_pitch, copy.width_bytes);
    }
  }
}

void perform_phantom(Machine& machine, const Fill& fill) {
  const bool is_small = fill.width_bytes() * fill.height <= KnownBytes::kRunBytesMax;
  for (std::size_t row = 0; row < fill.height; ++row) {
    const Address target = fill.destination + row * fill.pitch;
    if (is_small) {
      fill_bytes(reinterpret_cast<std::byte*>(machine.addresses.to_host(target)), fill);
    }
    machine.known.set(target, fill.width_bytes(), is_small);
  }
}

void perform_phantom(Machine& machine, const Kernel& kernel) {
  bool is_real = true;
  for (const KernelAccess& range : kernel.accesses) {
    is_real = is_real && range.size_bytes <= KnownBytes::kRunBytesMax &&
              (range.is_write || machine.known.is_known(range.address, range.size_bytes));
  }
  if (is_real || kernel.drop == nullptr) {
    kernel.body(kernel.argument);
  } else {
    kernel.drop(kernel.argument);
  }
  for (const KernelAccess& range : kernel.accesses) {
    if (range.is_write) machine.known.set(range.address, range.size_bytes, is_real);
  }
}

bool takes_phantom_source(const Machine& machine, const Copy& copy) {
  if (copy.width_bytes * copy.height > KnownBytes::kRunBytesMax) return false;
  for (std::size_t row = 0; row < copy.height; ++row) {
    if (!machine.known.is_known(copy.source + row * copy.source_pitch, copy.width_bytes)) {
      return false;
    }
  }
  return true;
}

}  // namespace spillover::emulator
