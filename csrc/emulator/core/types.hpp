// Words that every part of the emulated device shares: addresses, tickets, the one lock.
//
// Note [One lock]: one mutex, Machine::mutex, guards all state of the emulated device. Functions
// that take a Lock& are called with it held; those that may let go of it for a while (because they
// run operations, or wait for somebody who does) say so. No host function, kernel body, copy or
// memset ever runs with the lock held.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>

namespace spillover::emulator {

using Address = std::uintptr_t;

// Number of an operation on its stream, counted from 1; operations of a stream run in this order.
using Ticket = std::uint64_t;

using Lock = std::unique_lock<std::mutex>;

inline constexpr int kDeviceCountMax = 16;

// Mapping unit of the virtual memory functions, as on every current NVIDIA GPU.
inline constexpr std::size_t kGranularityBytes = std::size_t{2} << 20;

constexpr std::size_t round_up(std::size_t value, std::size_t unit) {
  return (value + unit - 1) / unit * unit;
}

}  // namespace spillover::emulator
