#include "allocator/imports.hpp"

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "allocator/pools.hpp"
#include "base/bytes.hpp"
#include "base/error.hpp"
#include "base/file_descriptor.hpp"
#include "driver/context.hpp"
#include "driver/device.hpp"
#include "driver/fork_guard.hpp"
#include "driver/virtual_memory.hpp"

namespace spillover {
namespace {

// More than any device has.
constexpr size_t kSizeMax = size_t{1} << 46U;

size_t total_bytes(const std::vector<SharedChunk>& chunks) {
  size_t total = 0;
  for (const SharedChunk& chunk : chunks) {
    if (chunk.size_bytes == 0 || chunk.size_bytes > kSizeMax - total || chunk.file < 0) {
      throw ConfigError("the shared memory is not of this form: a chunk of " +
                        std::to_string(chunk.size_bytes) + " bytes with file descriptor " +
                        std::to_string(chunk.file));
    }
    total += chunk.size_bytes;
  }
  return total;
}

// Addresses that chunks of another process are mapped at.
class MappedChunks {
 public:
  MappedChunks(int process, const std::vector<SharedChunk>& chunks, const std::vector<int>& devices)
      : device_(devices.front()),
        size_bytes_(total_bytes(chunks)),
        reservation_(device_, size_bytes_) {
    const ProcessFiles files(process);
    try {
      for (const SharedChunk& chunk : chunks) {
        memory_.push_back(
            PhysicalMemory::import_file(device_, files.copy(chunk.file), chunk.size_bytes));
        map_memory(address() + mapped_bytes_, memory_.back());
        mapped_bytes_ += chunk.size_bytes;
      }
      allow(devices);
    } catch (...) {
      unmap();
      throw;
    }
  }
  ~MappedChunks() { unmap(); }
  MappedChunks(const MappedChunks&) = delete;
  MappedChunks& operator=(const MappedChunks&) = delete;

  DeviceAddress address() const { return reservation_.address(); }
  void allow(const std::vector<int>& devices) const {
    allow_access(address(), size_bytes_, devices);
  }

 private:
  void unmap() noexcept {
    if (mapped_bytes_ != 0) unmap_memory_for_release(device_, address(), mapped_bytes_);
    mapped_bytes_ = 0;
  }

  const int device_;
  const size_t size_bytes_;
  AddressReservation reservation_;
  std::vector<PhysicalMemory> memory_;
  size_t mapped_bytes_ = 0;
};

}  // namespace

// One of the two kinds; the device's work is complete when it ends.
class Imports::Memory {
 public:
  explicit Memory(const Key& key) : device_(key.device) {
    if (key.chunks.empty()) {
      fixed_.emplace(key.device, key.handle);
    } else {
      mapped_.emplace(key.process, key.chunks, pool_of_device(key.device).devices());
    }
  }

  int device() const { return device_; }
  DeviceAddress address() const { return mapped_ ? mapped_->address() : fixed_->address(); }
  // Memory at a fixed address is peers' by their contexts' access.
  void allow(const std::vector<int>& devices) const {
    if (mapped_) mapped_->allow(devices);
  }

 private:
  const int device_;
  std::optional<MappedChunks> mapped_;
  std::optional<InterprocessMemory> fixed_;
};

Imports& Imports::instance() {
  static auto& imports = *new Imports;
  return imports;
}

void* Imports::open(int device, const SharedBlock& block) {
  check_not_forked();
  Key key{device, block.process, block.chunks, block.handle};
  const std::lock_guard lock(mutex_);
  auto entry = entries_.find(key);
  if (entry == entries_.end()) {
    const RelaxedCaptureScope relaxed;
    auto memory = std::make_unique<Memory>(key);
    entry = entries_.emplace(std::move(key), Entry{std::move(memory), 0}).first;
    addresses_.emplace(entry->second.memory->address(), entry);
  }
  ++entry->second.open_count;
  return reinterpret_cast<void*>(entry->second.memory->address());
}

void Imports::close(void* address) {
  if (in_forked_child()) return;
  std::unique_ptr<Memory> memory;
  {
    const std::lock_guard lock(mutex_);
    const auto found = addresses_.find(reinterpret_cast<DeviceAddress>(address));
    if (found == addresses_.end()) {
      throw ConfigError("the address " + std::to_string(reinterpret_cast<uintptr_t>(address)) +
                        " is not of memory that another process shares; it was closed before, or "
                        "never opened");
    }
    const auto entry = found->second;
    if (--entry->second.open_count != 0) return;
    memory = std::move(entry->second.memory);
    addresses_.erase(found);
    entries_.erase(entry);
  }
  const RelaxedCaptureScope relaxed;
  synchronize_device_for_release(memory->device());
  memory.reset();
}

void Imports::follow_peers(int device) {
  const std::lock_guard lock(mutex_);
  const std::vector<int> devices = pool_of_device(device).devices();
  for (const auto& [key, entry] : entries_) {
    if (key.device == device) entry.memory->allow(devices);
  }
}

}  // namespace spillover
