#include "tiers/disk_store.hpp"

#include <string>
#include <utility>

#include "base/error.hpp"
#include "tiers/disk_store_core.hpp"

namespace spillover {

using Direction = DiskStoreCore::Direction;

DiskPayload::DiskPayload(std::shared_ptr<DiskStoreCore> core, size_t size_bytes,
                         std::vector<Extent> extents)
    : core_(std::move(core)),
      size_bytes_(size_bytes),
      extents_(std::move(extents)),
      extents_left_(extents_.size()) {}

DiskPayload::~DiskPayload() {
  core_->release(extents_);
}

DiskStore::DiskStore(const DiskStoreOptions& options)
    : core_(std::make_shared<DiskStoreCore>(options)) {}

DiskStore::~DiskStore() {
  core_->close();
}

WriteRequest DiskStore::write(const void* data, size_t size_bytes, WriteGate gate) {
  if (data == nullptr || size_bytes == 0) throw ConfigError("a disk write needs some bytes");
  core_->check_open();
  core_->account_write(size_bytes);
  std::shared_ptr<DiskPayload> payload;
  // A failing piece empties the payload's list, so it is copied before the first is submitted.
  std::vector<Extent> extents;
  std::shared_ptr<Ticket> ticket;
  std::shared_ptr<WriteGate> shared_gate;
  try {
    payload = std::make_shared<DiskPayload>(core_, size_bytes, core_->allocate(size_bytes));
    extents = payload->extents();
    ticket = std::make_shared<Ticket>(extents.size());
    if (gate) shared_gate = std::make_shared<WriteGate>(std::move(gate));
  } catch (...) {
    core_->cancel_write(size_bytes);
    throw;
  }
  // From here on nothing throws: I/O threads have the memory.
  // They only read through this pointer: the direction says so.
  auto* bytes = static_cast<std::byte*>(const_cast<void*>(data));
  for (size_t i = 0; i < extents.size(); ++i) {
    core_->submit(
        {Direction::kWrite, payload, i, extents[i].size_bytes, bytes, ticket, shared_gate},
        extents[i].folder);
    bytes += extents[i].size_bytes;
  }
  return {std::move(payload), std::move(ticket)};
}

std::shared_ptr<Ticket> DiskStore::read(std::shared_ptr<DiskPayload> payload, void* data) {
  if (payload == nullptr || data == nullptr) throw ConfigError("a disk read needs memory");
  core_->check_open();
  if (payload->core_ != core_) throw StateError("the payload belongs to another disk store");
  if (payload->state() != DiskPayload::State::kStored) {
    throw StateError(payload->state() == DiskPayload::State::kWriting
                         ? "the payload is still being written; wait for the write's ticket first"
                         : "the payload was not stored: its write failed");
  }
  auto ticket = std::make_shared<Ticket>(payload->extents().size());
  auto* bytes = static_cast<std::byte*>(data);
  for (size_t i = 0; i < payload->extents().size(); ++i) {
    const Extent& extent = payload->extents()[i];
    core_->submit({Direction::kRead, payload, i, extent.size_bytes, bytes, ticket, nullptr},
                  extent.folder);
    bytes += extent.size_bytes;
  }
  return ticket;
}

void DiskStore::close() {
  core_->close();
}

DiskStats DiskStore::stats() const {
  return core_->stats();
}

int DiskStore::descriptor(size_t folder) const {
  return core_->descriptor(folder);
}

}  // namespace spillover
