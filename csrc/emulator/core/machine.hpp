// The emulated machine: everything there is one of. Made by the first successful cuInit and leaked
// on purpose, since threads, allocators and Python objects use it until the very end of the
// process.
//
// All members but those marked constant are guarded by mutex (types.hpp, Note [One lock]).
#pragma once

#include <cuda.h>

#include <cstddef>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "emulator/core/address_space.hpp"
#include "emulator/core/capture.hpp"
#include "emulator/core/clock/clock.hpp"
#include "emulator/core/config.hpp"
#include "emulator/core/context.hpp"
#include "emulator/core/device_memory.hpp"
#include "emulator/core/events.hpp"
#include "emulator/core/graph.hpp"
#include "emulator/core/handle_table.hpp"
#include "emulator/core/hazard_checker.hpp"
#include "emulator/core/host_memory.hpp"
#include "emulator/core/kernels.hpp"
#include "emulator/core/known_bytes.hpp"
#include "emulator/core/pool.hpp"
#include "emulator/core/scheduler.hpp"
#include "emulator/core/streams.hpp"
#include "emulator/core/types.hpp"
#include "emulator/core/virtual_memory.hpp"

namespace spillover::emulator {

// A loaded module or library; there is nothing in it but its handle.
struct Module {};

struct Device {
  // Set by an operation that failed when its turn came; every call on the device returns it from
  // then on.
  CUresult sticky_error = CUDA_SUCCESS;
  Pool* default_pool = nullptr;
  Pool* current_pool = nullptr;
};

class Machine {
 public:
  // CUDA_ERROR_INVALID_VALUE, with a sentence on stderr, when the configuration is malformed.
  static CUresult initialise();

  // Only where process_ready().
  static Machine& instance();

  explicit Machine(const Config& machine_config);
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;

  // Whether an operation may touch these bytes: live device memory, or any host memory.
  bool is_live(Address address, std::size_t size_bytes, bool is_write);

  // Whose memory it is; nothing for other addresses.
  std::optional<int> device_of(Address address);

  // Whether a device can reach these bytes: device memory, or memory that host_memory covers.
  // These are the bytes that the checker follows.
  bool is_device_accessible(Address address, std::size_t size_bytes) const {
    return addresses.contains(address) || host_memory.covers(address, size_bytes);
  }

  // Tells the checker of an access to memory that it follows; other memory is ignored. The ticket
  // is that of the stream's latest operation. True when there was a hazard.
  bool record_access(const Stream& stream, Ticket ticket, const char* name, AccessKind kind,
                     Address address, std::size_t size_bytes);
  bool record_host_access(const char* name, AccessKind kind, Address address,
                          std::size_t size_bytes);

  // The same in two steps, for callers with many ranges: what the access is, and each of its
  // ranges, which must be device-accessible.
  Access access_of(const Stream& stream, Ticket ticket, const char* name);
  Access host_access_of(const char* name);
  bool record(const Access& access, const VectorClock& clock, AccessKind kind, Address address,
              std::size_t size_bytes, Recording recording);

  // What a call returns that found a hazard, or did not.
  CUresult hazard_status(bool found) const {
    return found && hazards.raises() ? CUDA_ERROR_UNKNOWN : CUDA_SUCCESS;
  }

  CUresult& sticky_error(int device) {
    return devices[static_cast<std::size_t>(device)].sticky_error;
  }

  // Whether an operator may use these bytes on the device, now. Otherwise reports why not: freed,
  // unmapped, out of bounds, another device's.
  bool check_usable(const Stream& stream, const char* name, AccessKind kind, Address address,
                    std::size_t size_bytes);

  // Reports the use of a stream or event that was destroyed, of memory that was freed twice;
  // nothing where the program made the handle or address up.
  void report_dead_handle(ObjectHistory::Kind kind, Address handle);
  void report_double_free(Address address);

  // Keeps the beginnings and ends of memory for reports.
  void begin_memory(Address address, std::size_t size_bytes) {
    if (hazards.enabled()) {
      hazards.history().begin(ObjectHistory::Kind::kMemory, address, size_bytes);
    }
  }
  void end_memory(Address address) {
    if (hazards.enabled()) hazards.history().end(ObjectHistory::Kind::kMemory, address);
  }

  // Memory of another process was written there, which nobody saw; it is not uninitialised.
  void note_foreign_writes(const char* name, Address address, std::size_t size_bytes);

  // Called when memory was mapped: carries over what happened to bytes that have two addresses from
  // now on.
  void follow_mapping(Address address, std::size_t size_bytes);

  // Forgets what happened to memory that goes back to the driver.
  void forget(Address address, std::size_t size_bytes);

  // Gives an allocation back, with what is known of its bytes. The memory must be idle.
  void release_allocation(Address address);

  int device_count() const { return config.device_count; }

  std::mutex mutex;
  const Config config;     // constant
  AddressSpace addresses;  // its translation is constant
  KnownBytes known;        // has a lock of its own
  Budget budget;
  Clock clock;
  DeviceMemory device_memory;
  VirtualMemory virtual_memory;
  HostMemory host_memory;
  HazardChecker hazards;  // its policy is constant
  Contexts contexts;
  std::vector<Device> devices;
  Scheduler scheduler;
  Streams streams;
  Events events;
  Graphs graphs;
  Captures captures;
  Kernels kernels;
  HandleTable<std::unique_ptr<Pool>> pools;
  HandleTable<Module> modules;
  int pending_frees = 0;  // cuMemFreeAsync calls whose turn has not come

 private:
  bool can_reach(const Context& context, Address address);
  bool is_aliased(const ByteRange& range) const;
};

}  // namespace spillover::emulator
