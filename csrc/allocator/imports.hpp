// Blocks of other processes that this one has opened.
//
// What is opened again has the address that it has already, until it was closed as often: a process
// that gets many tensors of one block maps it once. One table for the process, leaked. Thread-safe:
// its mutex is taken before a pool's. In a forked child open() throws StateError, and the others do
// nothing, before a lock is taken.
//
// Memory is closed when the device's work is complete: nothing else knows which streams use it.
#pragma once

#include <compare>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "allocator/shared_memory.hpp"
#include "driver/types.hpp"

namespace spillover {

class Imports {
 public:
  static Imports& instance();

  // The address of the memory below a block (without offset_bytes, which is not looked at), for the
  // device and those that may use its pool. Throws ConfigError for what cannot be a block,
  // StateError where the other process has ended or closed it, DriverError.
  void* open(int device, const SharedBlock& block);

  // Blocks until the device's work is complete where it is the last close of this memory. Throws
  // ConfigError for an address that open() did not give.
  void close(void* address);

  // Lets the devices that may use a device's pool use what was opened on it, too.
  void follow_peers(int device);

 private:
  // Of which memory two calls are about, on which device.
  struct Key {
    int device;
    int process;
    std::vector<SharedChunk> chunks;
    InterprocessHandle handle;

    auto operator<=>(const Key&) const = default;
  };
  class Memory;
  struct Entry {
    std::unique_ptr<Memory> memory;
    size_t open_count = 0;
  };
  using Entries = std::map<Key, Entry>;

  Imports() = default;

  std::mutex mutex_;
  Entries entries_;                                       // Guarded by mutex_.
  std::map<DeviceAddress, Entries::iterator> addresses_;  // Guarded by mutex_.
};

}  // namespace spillover
