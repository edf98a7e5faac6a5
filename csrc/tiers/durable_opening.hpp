// Makes, opens and deletes durable stores: what is done once, before and after the requests.
//
// Each function may be called from any thread and blocks. PRIVATE to tiers/.
//
// Note [Making and deleting]. A store exists from the moment at which the primary's file gets its
// name. Before that every file is whole under the name of a file that is being made: its space is
// reserved, header, table and an empty commit are written and flushed (fsync: its size must outlast
// a loss of power, too), and so is that name (fsync of the folder). Then the other files are
// renamed, each durably, and the primary last. Deleting goes the same way backwards. So a store
// that is there in part is either one that was being made or deleted, which the primary's
// unfinished name proves, and is cleared away by who makes one there next; or one that lost a
// folder, which is an error.
//
// Note [Recovery]. The record has two copies, which commits write one after the other, flushing in
// between (Note [Commit]). So a loss of power damages one at most, and the newest of those that
// check out is the last commit:
//
//   first copy | second copy | what happened
//   n          | n           | commit n was done
//   n + 1      | n, damaged  | commit n + 1 had reached the disk; it counts, nobody was told
//   damaged    | n           | commit n + 1 had not reached the disk, or the block went bad; either
//                              way n is the last one that anybody was told of
//   damaged    | damaged     | no loss of power does that: CorruptDataError
//
// Nothing is guessed, and a commit that was acknowledged cannot be taken for one that was not.
// Everything that a record names was flushed before the record was written, so a manifest that
// does not check out is CorruptDataError, never a reason to go back. Opening ends by writing the
// record again, first over the other copy, flushed, then over its own: both are whole and on the
// disk before a slot that the older one names is written to. That also heals copies that were
// seen in a page cache alone, after a flush that had failed.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "tiers/durable_folder.hpp"
#include "tiers/durable_format.hpp"
#include "tiers/durable_layout.hpp"

namespace spillover {

struct DurableOptions {
  std::vector<std::string> folders;
  std::vector<DurableEntry> entries;         // None: the store must be there.
  std::optional<uint64_t> extent_bytes_max;  // Else what the store has, or a new one's default.
  std::optional<uint64_t> extra_bytes_max;
};

struct OpenDurable {
  std::vector<std::unique_ptr<DurableFolder>> folders;  // By their number; locked.
  DurableShape shape;
  std::unique_ptr<DurableLayout> layout;
  DurableRecord record;
  DurableManifest manifest;
  std::string notes;  // What this file system does not give; empty where all is well.
};

// Throws ConfigError where the store there is another than options ask for, StorageError,
// DiskFullError and CorruptDataError.
OpenDurable open_durable(const DurableOptions& options);

// Removes whatever of a durable store is in the folders. Throws StorageError: also where there is
// none, or where somebody has it open.
void delete_durable(const std::vector<std::string>& folders);

// For commits: both in the primary.
void write_record(const DurableFolder& primary, const OpenDurable& store,
                  const DurableRecord& record, size_t copy);
// The record that names what was written.
DurableRecord write_manifest(const DurableFolder& primary, const DurableLayout& layout,
                             const DurableManifest& manifest, uint64_t sequence);

}  // namespace spillover
