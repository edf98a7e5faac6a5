#include "tiers/durable_store.hpp"

#include <utility>

#include "base/error.hpp"
#include "tiers/durable_store_core.hpp"

namespace spillover {

DurableStore::DurableStore(const DurableStoreOptions& options)
    : core_(std::make_unique<DurableStoreCore>(options)) {}

DurableStore::~DurableStore() = default;

std::shared_ptr<Ticket> DurableStore::write(const Part& part, const void* data, WriteGate gate) {
  if (data == nullptr) throw ConfigError("a write needs some memory");
  // They only read through this pointer: the direction says so.
  return core_->write(part, static_cast<std::byte*>(const_cast<void*>(data)), std::move(gate));
}

std::shared_ptr<Ticket> DurableStore::read(const Part& part, void* data, DurableContents contents) {
  if (data == nullptr) throw ConfigError("a read needs some memory");
  return core_->read(part, static_cast<std::byte*>(data), contents);
}

uint64_t DurableStore::commit(const DurableExtra& extra) {
  return core_->commit(extra);
}

void DurableStore::rollback() {
  core_->rollback();
}

void DurableStore::verify() {
  core_->verify();
}

size_t DurableStore::register_memory(void* address, size_t size_bytes) {
  if (address == nullptr || size_bytes == 0) throw ConfigError("there is no memory to register");
  core_->check_open();
  return core_->engines().register_memory(static_cast<std::byte*>(address), size_bytes);
}

void DurableStore::unregister_memory(void* address) noexcept {
  core_->engines().unregister_memory(static_cast<std::byte*>(address));
}

void DurableStore::close() {
  core_->close();
}

const std::vector<DurableEntry>& DurableStore::entries() const {
  return core_->layout().entries();
}

uint64_t DurableStore::entry_bytes(std::string_view entry) const {
  const DurableLayout& layout = core_->layout();
  return layout.entries()[layout.find(entry)].size_bytes;
}

uint64_t DurableStore::extent_bytes() const {
  return core_->extent_bytes();
}

bool DurableStore::is_committed(std::string_view entry) const {
  return core_->is_committed(core_->layout().find(entry));
}

DurableExtra DurableStore::extra() const {
  return core_->extra();
}

DurableStats DurableStore::stats() const {
  return core_->stats();
}

}  // namespace spillover
