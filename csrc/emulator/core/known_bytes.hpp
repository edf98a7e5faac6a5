// Which bytes have values in a dry run.
//
// Note [Phantom memory]: in a dry run device and pinned memory have addresses and sizes but no
// bytes, but for small values, which steer the control flow of a program: a gradient scaler's
// scale, lengths, masks. Device memory is unknown unless a real value was written to it; the host's
// memory is known unless unknown device memory was copied to it. An operator whose inputs are known
// and small runs for real; every other write makes its target unknown. Known bytes lie where they
// lie without a dry run, so code that reads them needs nothing new; the other pages of the arenas
// are never touched and cost nothing.
//
// Owned by the Machine; any thread may call, with or without Machine::mutex, since it has a lock of
// its own under which nothing else is called.
#pragma once

#include <atomic>
#include <cstddef>
#include <map>
#include <mutex>

#include "emulator/core/types.hpp"

namespace spillover::emulator {

class AddressSpace;

// Disjoint, non-adjacent runs of addresses.
class AddressSet {
 public:
  void insert(Address begin, Address end);
  void erase(Address begin, Address end);
  bool covers(Address begin, Address end) const;
  bool intersects(Address begin, Address end) const;
  std::size_t run_count() const { return runs_.size(); }

  // Calls function(begin, end) for the parts of [begin, end) that are in the set.
  template <typename Function>
  void for_each_run(Address begin, Address end, Function&& function) const {
    auto position = runs_.upper_bound(begin);
    if (position != runs_.begin()) --position;
    for (; position != runs_.end() && position->first < end; ++position) {
      const Address from = position->first < begin ? begin : position->first;
      const Address to = position->second < end ? position->second : end;
      if (from < to) function(from, to);
    }
  }

 private:
  std::map<Address, Address> runs_;  // begin to end
};

class KnownBytes {
 public:
  // Longer runs of the host's memory become unknown on the device: they are data, and no operator
  // would compute with them.
  static constexpr std::size_t kRunBytesMax = std::size_t{64} << 10;

  explicit KnownBytes(const AddressSpace* addresses) : addresses_(addresses) {}

  // Addresses are the program's (device pointers or the host's own), or where a device pointer's
  // bytes lie.
  bool is_known(Address address, std::size_t size_bytes) const;
  void set(Address address, std::size_t size_bytes, bool is_known);

  // Memory that goes back to the driver: the next owner of the addresses starts anew.
  void forget(Address address, std::size_t size_bytes);

  // Moves the known parts of one row of a copy, and what is known of them.
  void copy(Address destination, Address source, std::size_t size_bytes);

  // 0 lets callers skip the question for the host's memory.
  std::size_t unknown_host_runs() const {
    return unknown_host_runs_.load(std::memory_order_acquire);
  }

 private:
  bool is_known_locked(Address address, std::size_t size_bytes) const;
  void set_locked(Address address, std::size_t size_bytes, bool is_known);
  void move_bytes(Address destination, Address source, std::size_t size_bytes) const;

  const AddressSpace* addresses_;
  mutable std::mutex mutex_;
  AddressSet device_known_;  // guarded by mutex_
  AddressSet host_unknown_;  // guarded by mutex_
  std::atomic<std::size_t> unknown_host_runs_{0};
};

}  // namespace spillover::emulator
