// Commits and rollbacks of a durable store.
//
// Note [Commit]. The order of writes, and what each flush is for. It begins when every write of
// data is complete; none begins before it ends.
//
//   1. Write the manifest to the slot that the current record does not name.
//   2. fdatasync of every file that was written to, of all at once: disks flush by themselves, and
//      nothing orders one of these flushes after another. Without it the record of step 3 could
//      reach the disk before what it names. O_DIRECT does not make this superfluous: data may be in
//      the drive's cache, and on a file system that reserves space by unwritten extents the journal
//      has yet to say that they are written. fdatasync is enough, since no file changes its size:
//      that was made durable by an fsync when the store was made.
//   3. Write the first copy of the record, and fdatasync of the primary. Without it step 4 could
//      overtake it, and both copies be torn by one loss of power. When it returns the commit is
//      durable.
//   4. Write the second copy, and fdatasync of the primary. Without it the commit could be
//      acknowledged while one block alone says so; if that one went bad, recovery would take the
//      older copy for the truth (Note [Recovery]), whose slots have been written to since.
//
// Then the slots change roles in memory, and the caller is told. No folder is flushed: names do not
// change. What the older commit names is not written to before that.
//
// A write of step 1 that fails leaves everything as it was: the commit may be tried again. From
// step 2 on a failure is the store's end until it is opened again. After a flush that failed the
// kernel may have marked what it lost as clean, so a second flush says that all is well and is a
// lie (Rebello et al., "Can Applications Recover from fsync Failures?", ATC 2020); and whether a
// record that failed to be written is there, only recovery may say. What was committed before can
// be read all along. A commit that failed in step 3 or 4 may be the one that is found by the next
// who opens the store, as a whole.
#include <cerrno>
#include <string>
#include <utility>
#include <vector>

#include "base/error.hpp"
#include "tiers/durable_store_core.hpp"
#include "trace/span.hpp"

namespace spillover {
namespace {

constexpr TraceLabel kCommit{"commit", "stall"};

// One call of commit(), for the counters and the trace.
class TimedCommit {
 public:
  explicit TimedCommit(WaitCounters& counters) : counters_(counters), span_(kCommit) {}
  ~TimedCommit() { counters_.add(trace_now_ns() - begin_ns_); }
  TimedCommit(const TimedCommit&) = delete;
  TimedCommit& operator=(const TimedCommit&) = delete;

 private:
  WaitCounters& counters_;
  const TraceSpan span_;
  const int64_t begin_ns_ = trace_now_ns();
};

}  // namespace

class DurableStoreCore::Quiet {
 public:
  explicit Quiet(DurableStoreCore& core) : core_(core), exclusive_(core.exclusive_mutex_) {
    core_.check_open();
    std::unique_lock lock(core_.mutex_);
    core_.is_quiet_ = true;
    core_.changed_.wait(lock, [&] { return core_.pending_writes_ == 0; });
  }
  ~Quiet() {
    const std::lock_guard lock(core_.mutex_);
    core_.is_quiet_ = false;
    core_.changed_.notify_all();
  }
  Quiet(const Quiet&) = delete;
  Quiet& operator=(const Quiet&) = delete;

 private:
  DurableStoreCore& core_;
  const std::lock_guard<std::mutex> exclusive_;
};

DurableManifest DurableStoreCore::next_manifest(const DurableExtra& extra) const {
  DurableManifest manifest;
  manifest.extra_kind = extra.kind;
  manifest.extra = extra.bytes;
  manifest.extents.reserve(states_.size());
  for (size_t i = 0; i < states_.size(); ++i) {
    const State& state = states_[i];
    if (state.fresh == Fresh::kFailed) {
      throw StateError("the entry '" + layout().name_of(i) +
                       "' cannot be committed: a write of it failed. Write it again, or go back to "
                       "the last commit with rollback()");
    }
    const size_t slot = state.fresh == Fresh::kWritten ? state.fresh_slot() : state.committed;
    if (slot == kNoSlot) {
      manifest.extents.push_back({0, kNoSlot});
    } else {
      manifest.extents.push_back({state.crc32c[slot], static_cast<uint8_t>(slot)});
    }
  }
  return manifest;
}

uint64_t DurableStoreCore::commit(const DurableExtra& extra) {
  check_open();
  if (extra.bytes.size() > store_.shape.extra_bytes_max) {
    throw ConfigError(
        "extra has " + std::to_string(extra.bytes.size()) + " bytes, and this store has room for " +
        std::to_string(store_.shape.extra_bytes_max) + " (extra_limit, when it is made)");
  }
  const TimedCommit timed(commits_);
  const Quiet quiet(*this);
  DurableManifest manifest;
  uint64_t sequence = 0;
  {
    const std::lock_guard lock(mutex_);
    check_not_failed();
    manifest = next_manifest(extra);
    sequence = store_.record.sequence + 1;
  }
  make_durable(manifest, sequence);
  take_over(std::move(manifest));
  return sequence;
}

void DurableStoreCore::check_in_place() const {
  for (const auto& folder : store_.folders) {
    if (folder->is_in_place()) continue;
    throw StorageError("the durable store's file in " + folder->path() +
                           " was removed or replaced while the store was open: what is committed "
                           "now would be lost",
                       folder->path(), ENOENT);
  }
}

void DurableStoreCore::sync_written() const {
  std::vector<const DurableFolder*> folders;
  for (size_t i = 0; i < store_.folders.size(); ++i) {
    if (i == 0 || unsynced_[i]) folders.push_back(store_.folders[i].get());
  }
  sync(folders, SyncKind::kData);
}

// Steps 1 to 4 of Note [Commit].
void DurableStoreCore::make_durable(const DurableManifest& manifest, uint64_t sequence) {
  const DurableFolder& primary = *store_.folders.front();
  check_in_place();
  const DurableRecord record = write_manifest(primary, layout(), manifest, sequence);
  try {
    sync_written();
    for (const size_t copy : {0, 1}) {
      write_record(primary, store_, record, copy);
      primary.sync(SyncKind::kData);
    }
  } catch (...) {
    const std::lock_guard lock(mutex_);
    failure_ = std::current_exception();
    throw;
  }
  const std::lock_guard lock(mutex_);
  unsynced_.assign(unsynced_.size(), false);
  store_.record = record;
}

void DurableStoreCore::take_over(DurableManifest&& manifest) {
  const std::lock_guard lock(mutex_);
  for (size_t i = 0; i < states_.size(); ++i) {
    states_[i].committed = manifest.extents[i].slot;
    states_[i].fresh = Fresh::kNothing;
  }
  store_.manifest = std::move(manifest);
}

void DurableStoreCore::rollback() {
  check_open();
  const Quiet quiet(*this);
  const std::lock_guard lock(mutex_);
  for (State& state : states_) state.fresh = Fresh::kNothing;
}

}  // namespace spillover
