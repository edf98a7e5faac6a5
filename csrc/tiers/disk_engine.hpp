// How the extents of one folder get to its file and back: the seam between the disk store and the
// engines, which are threads that block (thread_engine.hpp) and io_uring (uring_engine.hpp).
//
// submit() may be called from any thread, close() by one at a time. PRIVATE to tiers/.
#pragma once

#include <cstddef>
#include <exception>
#include <memory>

#include "tiers/extent_io.hpp"
#include "tiers/folder_counters.hpp"
#include "tiers/ticket.hpp"
#include "tiers/transfer_progress.hpp"
#include "tiers/work_annotation.hpp"

namespace spillover {

class DiskPayload;

// One extent of a request. An engine looks at direction, extent and data, sets the checksum of an
// extent that it wrote and notes what happens; the rest is the store's.
struct DiskPiece {
  TransferDirection direction;
  Extent extent;
  std::byte* data;                       // Only read from in a write.
  std::shared_ptr<DiskPayload> payload;  // Of a scratch store; others need none.
  size_t index;                          // Of the payload's extent, or of the store's.
  std::shared_ptr<Ticket> ticket;
  WorkId work = 0;  // What the virtual clock calls it.
  ExtentNotes notes{};
};

// The store, as its engines see it. Thread-safe.
class DiskPieceOwner {
 public:
  // The piece goes to its folder's engine now: its gate, if it had one, is open.
  virtual void start(const DiskPiece& /*piece*/) noexcept {}

  // The engine is done with the piece and its memory; error is null where all went well.
  virtual void finish(DiskPiece& piece, std::exception_ptr error) noexcept = 0;

 protected:
  ~DiskPieceOwner() = default;
};

class DiskEngine {
 public:
  DiskEngine() = default;
  DiskEngine(const DiskEngine&) = delete;
  DiskEngine& operator=(const DiskEngine&) = delete;
  // close() comes first.
  virtual ~DiskEngine() = default;

  // Blocks while the queue is full. False, and the piece untouched, once the engine is closed.
  virtual bool submit(DiskPiece&& piece) = 0;

  // Tells of memory that many requests will use, until it is told that none will: an engine may
  // prepare it. The bytes that it did, 0 for none. Any thread; blocks until it is done.
  virtual size_t register_memory(std::byte* /*address*/, size_t /*size_bytes*/) { return 0; }
  virtual void unregister_memory(std::byte* /*address*/) noexcept {}

  // Refuses new pieces, finishes those it has, and ends its threads. May be called again.
  virtual void close() noexcept = 0;
};

}  // namespace spillover
