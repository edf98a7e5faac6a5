// Storage that outlives its process: named entries of fixed sizes, and commits of all of them.
//
// Each extent of an entry has two slots. Writing goes to the one that is not committed, in place
// when it is written again; commit() makes what was written the store's contents, all or nothing,
// together with some extra bytes; rollback() forgets it. Whatever happens to the process or to the
// machine, the next who opens the store finds the last commit. Extents that were not written since
// keep their slot: nothing is copied.
//
// Every method may be called from any thread. write() and read() block while a folder's queue is
// full, and write() while a commit or rollback is under way; those two wait for the writes that are
// under way. The memory of a request must stay valid, and a write's unchanged, until its ticket is
// done. In a forked child everything throws StateError.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "tiers/disk_store.hpp"
#include "tiers/durable_format.hpp"
#include "tiers/durable_opening.hpp"
#include "tiers/ticket.hpp"

namespace spillover {

struct DurableStoreOptions {
  DurableOptions store;
  DiskEngineKind engine = DiskEngineKind::kAuto;
  uint64_t write_limit_bytes = UINT64_MAX;  // On bytes that this object writes.
  size_t threads_per_folder = 4;
  size_t queue_length_max = 64;
};

struct DurableFolderStats {
  std::string folder;
  bool is_direct;       // The file system takes O_DIRECT.
  uint64_t file_bytes;  // Reserved.
  DiskDirectionStats writes;
  DiskDirectionStats reads;
};

struct DurableStats {
  uint64_t sequence;         // Of the last commit.
  uint64_t written_bytes;    // As requested, of writes accepted.
  uint64_t read_bytes;       // As requested, of reads that went well.
  uint64_t file_bytes;       // Reserved, in all folders.
  uint64_t pending_extents;  // Queued or moving.
  bool is_direct;            // Every folder takes O_DIRECT.
  DiskEngineKind engine;     // Never kAuto.
  std::string engine_notes;  // Why it is not io_uring, or what that lacks.
  std::string notes;         // What the file system lacks.
  std::vector<DurableFolderStats> folders;
  WaitStats waits;    // For tickets that were not done yet.
  WaitStats commits;  // Calls of commit(), and how long they took, failed ones included.
};

struct DurableExtra {
  uint8_t kind = 0;
  std::vector<std::byte> bytes;
};

// Which contents of an entry to read.
enum class DurableContents {
  kNewest,     // As written last.
  kCommitted,  // As of the last commit.
};

class DurableStoreCore;

class DurableStore {
 public:
  // Throws what open_durable() throws, and StorageError when the engine that is asked for cannot be
  // used.
  explicit DurableStore(const DurableStoreOptions& options);
  ~DurableStore();
  DurableStore(const DurableStore&) = delete;
  DurableStore& operator=(const DurableStore&) = delete;

  // Part of an entry: whole extents, up to its end.
  struct Part {
    std::string_view entry;
    uint64_t offset;
    uint64_t size_bytes;
  };

  // Throws ConfigError for a part that is none; StateError where it is being written or read; the
  // store's error where it has failed; DiskFullError at the write limit.
  std::shared_ptr<Ticket> write(const Part& part, const void* data, WriteGate gate = nullptr);

  // Throws ConfigError; StateError where there are no such contents. The ticket's errors:
  // StorageError, CorruptDataError.
  std::shared_ptr<Ticket> read(const Part& part, void* data, DurableContents contents);

  // Returns the commit's sequence number. Throws StateError where a write has failed since the last
  // commit, StorageError where this one cannot be made durable: see Note [Commit]. Blocks.
  uint64_t commit(const DurableExtra& extra);
  void rollback();

  // Reads everything that is committed. Throws CorruptDataError, StorageError. Blocks.
  void verify();

  size_t register_memory(void* address, size_t size_bytes);
  void unregister_memory(void* address) noexcept;

  // Refuses new requests, waits for those under way, and lets others open the store. What was not
  // committed is forgotten. May be called twice.
  void close();

  const std::vector<DurableEntry>& entries() const;
  uint64_t entry_bytes(std::string_view entry) const;
  uint64_t extent_bytes() const;
  // Whether all of the entry is committed.
  bool is_committed(std::string_view entry) const;
  // What was committed last.
  DurableExtra extra() const;
  DurableStats stats() const;

 private:
  std::unique_ptr<DurableStoreCore> core_;
};

}  // namespace spillover
