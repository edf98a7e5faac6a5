// The seam behind which the contents of sleeping memory are kept: host memory today, other tiers
// later. The pool says what is to be copied and when; it knows nothing of where to.
//
// A store is shared by all sleeps and may be used from any thread; a SavedContents belongs to one
// sleep and is used by one thread at a time. No method is called under a lock, except drop().
//
// Order of calls on a SavedContents: for each piece in ascending order start_save, some time later
// finish_save; then any number of wakings, each of which calls start_load for pieces in ascending
// order and then either finish_loads or settle. Until the first waking ends well every piece that
// was not dropped must be kept.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "driver/types.hpp"

namespace spillover {

// A range of device memory and where in its piece it is kept.
struct ContentPart {
  DeviceAddress address = 0;
  size_t size_bytes = 0;
  size_t offset_bytes = 0;

  DeviceAddress end() const { return address + size_bytes; }
};

// What is copied, and given up, as one. Parts come in the order of their addresses and offsets, do
// not overlap, and cover the piece.
struct ContentPiece {
  std::vector<ContentPart> parts;
  size_t size_bytes = 0;
};

class SavedContents {
 public:
  SavedContents() = default;
  // No copy runs any more: finish_loads() or settle() came after the last start_*.
  virtual ~SavedContents() = default;
  SavedContents(const SavedContents&) = delete;
  SavedContents& operator=(const SavedContents&) = delete;

  // Finds room for the piece and starts to copy it out. Blocks for no longer than that takes.
  // Throws HostOutOfMemoryError, DriverError.
  virtual void start_save(size_t piece) = 0;
  // Blocks until the piece is kept: its device memory may go. Throws DriverError.
  virtual void finish_save(size_t piece) = 0;

  // Starts to copy parts of a piece, or parts of its parts, back to their addresses.
  virtual void start_load(size_t piece, const std::vector<ContentPart>& parts) = 0;
  // Blocks until everything that was started is in its place. Throws DriverError.
  virtual void finish_loads() = 0;

  // Gives up a piece that nobody will ask for. Does not block; no copy of it runs.
  virtual void drop(size_t piece) noexcept = 0;

  // After a failure: blocks until no copy reads or writes anything any more.
  virtual void settle() noexcept = 0;
};

class ContentStore {
 public:
  ContentStore() = default;
  virtual ~ContentStore() = default;
  ContentStore(const ContentStore&) = delete;
  ContentStore& operator=(const ContentStore&) = delete;

  // Everything that was submitted to the device before is complete.
  virtual std::unique_ptr<SavedContents> begin(int device,
                                               const std::vector<ContentPiece>& pieces) = 0;
};

}  // namespace spillover
