#include "emulator/core/machine.hpp"

#include <cstdio>
#include <string>

#include "emulator/core/fault_plan.hpp"
#include "emulator/core/hazard_text.hpp"
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
      known(&addresses),
      budget(config.vram_bytes),
      clock(this, config),
      device_memory(&addresses, &budget,
                    config.dry      ? FreshMemory::kPhantom
                    : config.poison ? FreshMemory::kPoisoned
                                    : FreshMemory::kPlain),
      virtual_memory(&addresses, &budget, config.poison && !config.dry, config.device_count),
      host_memory(config.dry),
      hazards(config.hazards),
      contexts(config.device_count),
      devices(static_cast<std::size_t>(config.device_count)),
      scheduler(this, config),
      streams(this, config.device_count),
      events(this),
      captures(this),
      pools(kPoolTag, HandleReuse::kNever),
      modules(kModuleTag, HandleReuse::kNever) {
  for (int ordinal = 0; ordinal < config.device_count; ++ordinal) {
    auto pool = std::make_unique<Pool>();
    pool->device = ordinal;
    pool->is_default = true;
    pool->device_access[static_cast<std::size_t>(ordinal)] = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
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

std::optional<int> Machine::device_of(Address address) {
  if (const Allocation* allocation = device_memory.find(address)) return allocation->device;
  const Mapping* mapping = virtual_memory.find_mapping(address);
  return mapping == nullptr ? std::nullopt : std::optional(virtual_memory.device_of(*mapping));
}

Access Machine::access_of(const Stream& stream, Ticket ticket, const char* name) {
  return {.name = hazards.intern(name),
          .actor = stream.actor,
          .tick = ticket,
          .stream_id = stream.id,
          .order = hazards.next_order(),
          .site = current_site()};
}

Access Machine::host_access_of(const char* name) {
  return {.name = hazards.intern(name),
          .actor = kHostActor,
          .tick = streams.host_tick(),
          .stream_id = 0,
          .order = hazards.next_order(),
          .site = current_site()};
}

bool Machine::record_access(const Stream& stream, Ticket ticket, const char* name, AccessKind kind,
                            Address address, std::size_t size_bytes) {
  if (!hazards.enabled() || !is_device_accessible(address, size_bytes)) return false;
  return record(access_of(stream, ticket, name), stream.clock, kind, address, size_bytes,
                Recording::kYes);
}

bool Machine::record_host_access(const char* name, AccessKind kind, Address address,
                                 std::size_t size_bytes) {
  if (!hazards.enabled() || !is_device_accessible(address, size_bytes)) return false;
  return record(host_access_of(name), streams.threads().current().clock, kind, address, size_bytes,
                Recording::kYes);
}

bool Machine::record(const Access& access, const VectorClock& clock, AccessKind kind,
                     Address address, std::size_t size_bytes, Recording recording) {
  const ByteRange range{address, size_bytes};
  if (addresses.contains(address)) {
    if (hazards.check_block(access, kind, range)) return true;
    if (config.uninitialized && !is_aliased(range) && hazards.check_written(access, kind, range)) {
      return true;
    }
  }
  if (!addresses.contains(address) && !(access.actor == kHostActor && kind == AccessKind::kRead)) {
    // Torch's cache of pinned memory gives a block that one thread has waited for to another. Only
    // the host's reads ask for what the reading thread itself knows.
    VectorClock known = clock;
    known.merge(streams.threads().everyone());
    return hazards.record(access, known, known, kind, range, address, recording);
  }
  const VectorClock& everyone = streams.threads().everyone();
  bool found = hazards.record(access, clock, everyone, kind, range, address, recording);
  // Freeing one address of several does not touch what runs through the others.
  if (!virtual_memory.has_aliases() || kind == AccessKind::kFree) return found;
  virtual_memory.for_each_alias(
      address, size_bytes, [&](Address key, Address begin, std::size_t part_bytes) {
        const ByteRange shown{begin, part_bytes};
        found = hazards.record(access, clock, everyone, kind, shown, key, recording) || found;
      });
  return found;
}

// Bytes with two addresses may have been written through the other one.
bool Machine::is_aliased(const ByteRange& range) const {
  bool found = false;
  if (virtual_memory.has_aliases()) {
    virtual_memory.for_each_alias(range.address, range.size_bytes,
                                  [&](Address, Address, std::size_t) { found = true; });
  }
  return found;
}

void Machine::note_foreign_writes(const char* name, Address address, std::size_t size_bytes) {
  record_host_access(name, AccessKind::kWrite, address, size_bytes);
}

void Machine::follow_mapping(Address address, std::size_t size_bytes) {
  begin_memory(address, size_bytes);
  Mapping first;
  if (!hazards.enabled() || !virtual_memory.note_alias(address, &first)) return;
  virtual_memory.for_each_alias(first.address, first.size_bytes,
                                [&](Address key, Address begin, std::size_t part_bytes) {
                                  hazards.copy_history({begin, part_bytes}, key);
                                });
}

void Machine::forget(Address address, std::size_t size_bytes) {
  if (config.dry) known.forget(address, size_bytes);
  if (!hazards.enabled()) return;
  hazards.forget(address, size_bytes);
  streams.forget_values(address, size_bytes);
  for (const AliasKey& key : virtual_memory.take_dead_keys()) {
    hazards.forget(key.address, key.size_bytes);
  }
}

void Machine::report_dead_handle(ObjectHistory::Kind kind, Address handle) {
  if (!hazards.enabled()) return;
  const ObjectHistory::Life* life = hazards.history().find_gone(kind, handle);
  if (life == nullptr) return;
  const bool is_stream = kind == ObjectHistory::Kind::kStream;
  char what[96];
  if (is_stream) {
    std::snprintf(what, sizeof what, "stream %llu (handle 0x%zx)",
                  static_cast<unsigned long long>(life->id), handle);
  } else {
    std::snprintf(what, sizeof what, "event 0x%zx", handle);
  }
  std::string text(documented_name(current_call()));
  text += std::string(" uses ") + what + " after its destruction";
  text += std::string("\n  kind: ") + (is_stream ? "stream" : "event") + " used after destruction";
  const std::string ended = describe_site(life->ended_at, "    ");
  if (!ended.empty()) {
    text += "\n  destroyed by " + std::string(documented_name(life->ended_by)) + " at:" + ended;
  }
  const std::string used = describe_site(current_site(), "    ");
  if (!used.empty()) text += "\n  used at:" + used;
  text += std::string("\n  keep the ") + (is_stream ? "stream" : "event") +
          " until its last use, and ask for a new one after it";
  hazards.report_misuse(text, std::string("handle|") + current_call());
}

void Machine::report_double_free(Address address) {
  if (!hazards.enabled()) return;
  const ObjectHistory::Life* life =
      hazards.history().find_gone(ObjectHistory::Kind::kMemory, address);
  if (life == nullptr || life->address != address) return;
  std::string text(documented_name(current_call()));
  text += " frees memory that is free already";
  text += "\n  kind: double free\n  memory: " + describe_memory(*life);
  const std::string used = describe_site(current_site(), "    ");
  if (!used.empty()) text += "\n  freed again at:" + used;
  text += "\n  free it once: where it may have two owners, let one of them be responsible";
  hazards.report_misuse(text, std::string("double free|") + current_call());
}

bool Machine::check_usable(const Stream& stream, const char* name, AccessKind kind, Address address,
                           std::size_t size_bytes) {
  if (!addresses.contains(address) || size_bytes == 0) return true;
  const bool is_write = kind != AccessKind::kRead;
  const bool live = is_live(address, size_bytes, is_write);
  if (live && (config.device_count == 1 || can_reach(*stream.context, address))) return true;
  const Access access = access_of(stream, stream.enqueued, name);
  const ByteRange range{address, size_bytes};
  std::string text = describe_access(access, kind, range);
  const ObjectHistory& history = hazards.history();
  Address base = 0;
  std::size_t reserved = 0;
  if (live) {
    text += " on device " + std::to_string(stream.device) +
            ", which may not reach another device's memory\n  kind: cross-device use without peer "
            "access\n  enable it (cuCtxEnablePeerAccess, cuMemSetAccess), or copy the data over";
  } else if (virtual_memory.find_reservation(address, &base, &reserved)) {
    text +=
        virtual_memory.find_mapping(address) == nullptr
            ? ", where nothing is mapped\n  kind: access while unmapped or asleep\n  map it "
              "first (cuMemMap and cuMemSetAccess; a tag that sleeps: allocator.wake), or use it "
              "before it goes"
            : ", which its mapping does not allow\n  kind: access without permission\n  allow it "
              "with cuMemSetAccess";
  } else if (history.find_gone(ObjectHistory::Kind::kMemory, address) != nullptr) {
    text +=
        " after it was freed\n  kind: use after free\n  free it after its last use: behind it on "
        "the "
        "stream (cuMemFreeAsync), or later";
  } else {
    text += ", which is not inside live device memory\n  kind: illegal address";
  }
  const ObjectHistory::Life* life = history.find_live(ObjectHistory::Kind::kMemory, address);
  if (life == nullptr) life = history.find_gone(ObjectHistory::Kind::kMemory, address);
  if (life != nullptr) text += "\n  memory: " + describe_memory(*life);
  hazards.report_misuse(text + describe_use(kind, range, current_site()),
                        std::string("use|") + name);
  return false;
}

// Peer access between contexts covers what cuMemAlloc gave; pools and mappings say themselves who
// may reach them.
bool Machine::can_reach(const Context& context, Address address) {
  const auto device = static_cast<std::size_t>(context.device);
  const Allocation* allocation = device_memory.find(address);
  if (allocation != nullptr) {
    if (allocation->device == context.device) return true;
    if (allocation->pool != nullptr) {
      return allocation->pool->device_access[device] != CU_MEM_ACCESS_FLAGS_PROT_NONE;
    }
    return (context.enabled_peers >> allocation->device & 1U) != 0;
  }
  const Mapping* mapping = virtual_memory.find_mapping(address);
  return mapping == nullptr || mapping->device_access[device] != CU_MEM_ACCESS_FLAGS_PROT_NONE;
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
  end_memory(allocation->address);
  device_memory.free(allocation->address);
}

}  // namespace spillover::emulator
