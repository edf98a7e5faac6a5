#include "emulator/core/machine.hpp"

#include "emulator/core/process.hpp"

namespace spillover::emulator {
namespace {

constexpr std::uint8_t kPoolTag = 0x53;
constexpr std::uint8_t kModuleTag = 0x54;

Machine* the_machine = nullptr;

}  // namespace

CUresult Machine::initialise() {
  static std::mutex starting;
  const std::lock_guard<std::mutex> guard(starting);
  if (the_machine != nullptr) return CUDA_SUCCESS;
  const Config& wanted = emulator::config();
  if (!wanted.error.empty()) {
    report("%s", wanted.error.c_str());
    return CUDA_ERROR_INVALID_VALUE;
  }
  the_machine = new Machine(wanted);
  mark_process_ready();
  return CUDA_SUCCESS;
}

Machine& Machine::instance() {
  return *the_machine;
}

Machine::Machine(const Config& machine_config)
    : config(machine_config),
      budget(config.vram_bytes),
      device_memory(&addresses, &budget, config.poison),
      virtual_memory(&addresses, &budget, config.poison, config.device_count),
      hazards(config.hazards),
      contexts(config.device_count),
      devices(static_cast<std::size_t>(config.device_count)),
      scheduler(this, config),
      streams(this, config.device_count),
      events(this),
      pools(kPoolTag, HandleReuse::kNever),
      modules(kModuleTag, HandleReuse::kNever) {
  for (int ordinal = 0; ordinal < config.device_count; ++ordinal) {
    auto pool = std::make_unique<Pool>();
    pool->device = ordinal;
    pool->is_default = true;
    Device& device = devices[static_cast<std::size_t>(ordinal)];
    device.default_pool = device.current_pool = pool.get();
    CUmemoryPool handle = nullptr;
    Pool* const raw = pool.get();
    pools.insert(std::move(pool), &handle);
    raw->handle = handle;
  }
}

bool Machine::is_live(Address address, std::size_t size_bytes, bool is_write) {
  if (!addresses.contains(address))
    return true;  // the host's own, which may end where an arena begins
  const Allocation* allocation = device_memory.find(address);
  if (allocation != nullptr) {
    return size_bytes <= allocation->address + allocation->size_bytes - address;
  }
  return virtual_memory.accessible(address, size_bytes, is_write);
}

bool Machine::record_access(const Stream& stream, Ticket ticket, const char* name, AccessKind kind,
                            Address address, std::size_t size_bytes, Recording recording) {
  if (!hazards.enabled() || !is_device_accessible(address, size_bytes)) return false;
  const Access access{hazards.intern(name), stream.actor, ticket, stream.id};
  return record(access, stream.clock, kind, address, size_bytes, recording);
}

bool Machine::record_host_access(const char* name, AccessKind kind, Address address,
                                 std::size_t size_bytes, Recording recording) {
  if (!hazards.enabled() || !is_device_accessible(address, size_bytes)) return false;
  const Access access{hazards.intern(name), kHostActor, streams.host_tick(), 0};
  return record(access, streams.host_clock(), kind, address, size_bytes, recording);
}

bool Machine::record(const Access& access, const VectorClock& clock, AccessKind kind,
                     Address address, std::size_t size_bytes, Recording recording) {
  bool found = hazards.record(access, clock, kind, {address, size_bytes}, address, recording);
  // Freeing one address of several does not touch what runs through the others.
  if (!virtual_memory.has_aliases() || kind == AccessKind::kFree) return found;
  virtual_memory.for_each_alias(
      address, size_bytes, [&](Address key, Address begin, std::size_t part_bytes) {
        const ByteRange shown{begin, part_bytes};
        found = hazards.record(access, clock, kind, shown, key, recording) || found;
      });
  return found;
}

void Machine::follow_mapping(Address address) {
  Mapping first;
  if (!hazards.enabled() || !virtual_memory.note_alias(address, &first)) return;
  virtual_memory.for_each_alias(first.address, first.size_bytes,
                                [&](Address key, Address begin, std::size_t part_bytes) {
                                  hazards.copy_history({begin, part_bytes}, key);
                                });
}

void Machine::forget(Address address, std::size_t size_bytes) {
  if (!hazards.enabled()) return;
  hazards.forget(address, size_bytes);
  streams.forget_values(address, size_bytes);
  for (const AliasKey& key : virtual_memory.take_dead_keys()) {
    hazards.forget(key.address, key.size_bytes);
  }
}

void Machine::release_allocation(Address address) {
  const Allocation* allocation = device_memory.find(address);
  if (allocation == nullptr) return;
  forget(allocation->address, allocation->size_bytes);
  Pool* const pool = allocation->pool;
  if (pool != nullptr) {
    pool->used_bytes -= allocation->charged_bytes;
    if (pool->destroyed && pool->used_bytes == 0) pools.erase(pool->handle);
  }
  device_memory.free(allocation->address);
}

}  // namespace spillover::emulator
