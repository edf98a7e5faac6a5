#include "tiers/disk_store.hpp"

#include <string>
#include <utility>

#include "base/error.hpp"
#include "tiers/disk_store_core.hpp"

namespace spillover {
namespace {

// One piece for each extent; all have the ticket that is made for them.
std::vector<DiskPiece> cut(TransferDirection direction, std::shared_ptr<DiskPayload> payload,
                           std::byte* data, std::shared_ptr<WaitCounters> waits,
                           std::shared_ptr<Ticket>* ticket) {
  const std::vector<Extent>& extents = payload->extents();
  *ticket = std::make_shared<Ticket>(extents.size(), std::move(waits));
  std::vector<DiskPiece> pieces;
  pieces.reserve(extents.size());
  for (size_t i = 0; i < extents.size(); ++i) {
    pieces.push_back({direction, extents[i], data, payload, i, *ticket});
    data += extents[i].size_bytes;
  }
  return pieces;
}

}  // namespace

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
  WriteRequest request;
  std::vector<DiskPiece> pieces;
  try {
    request.payload = std::make_shared<DiskPayload>(core_, size_bytes, core_->allocate(size_bytes));
    // They only read through this pointer: the direction says so.
    pieces = cut(TransferDirection::kWrite, request.payload,
                 static_cast<std::byte*>(const_cast<void*>(data)), core_->waits(), &request.ticket);
  } catch (...) {
    core_->cancel_write(size_bytes);
    throw;
  }
  // From here on nothing throws: the engines have the memory.
  core_->submit(std::move(pieces), std::move(gate));
  return request;
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
  std::shared_ptr<Ticket> ticket;
  core_->submit(cut(TransferDirection::kRead, std::move(payload), static_cast<std::byte*>(data),
                    core_->waits(), &ticket),
                nullptr);
  return ticket;
}

size_t DiskStore::register_memory(void* address, size_t size_bytes) {
  if (address == nullptr || size_bytes == 0) throw ConfigError("there is no memory to register");
  core_->check_open();
  return core_->engines().register_memory(static_cast<std::byte*>(address), size_bytes);
}

void DiskStore::unregister_memory(void* address) noexcept {
  core_->engines().unregister_memory(static_cast<std::byte*>(address));
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
