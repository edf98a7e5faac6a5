// Finds the pool that an address belongs to, whatever its device: by reservation, or by chunk where
// addresses are fixed.
//
// Thread-safe. Its lock is a leaf: a pool's mutex may be held when it is taken, nothing is taken
// under it.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <optional>
#include <shared_mutex>

#include "driver/types.hpp"

namespace spillover {

class Pool;

class SegmentIndex {
 public:
  struct Entry {
    DeviceAddress address;
    size_t size_bytes;
    Pool* pool;
  };

  void insert(const Entry& entry) {
    const std::unique_lock lock(mutex_);
    entries_.emplace(entry.address, entry);
  }

  void erase(DeviceAddress address) {
    const std::unique_lock lock(mutex_);
    entries_.erase(address);
  }

  // The range that contains the address, first byte or not.
  std::optional<Entry> find(DeviceAddress address) const {
    const std::shared_lock lock(mutex_);
    auto position = entries_.upper_bound(address);
    if (position == entries_.begin()) return std::nullopt;
    const Entry& entry = std::prev(position)->second;
    if (address - entry.address >= entry.size_bytes) return std::nullopt;
    return entry;
  }

 private:
  mutable std::shared_mutex mutex_;
  std::map<DeviceAddress, Entry> entries_;  // Guarded by mutex_.
};

}  // namespace spillover
