// A disk in memory that loses power: for tests of what survives it.
//
// Note [Simulated disk]. It takes the place of the system's file operations. Names and contents are
// in memory; an open file is a real one without a name (memfd), so that every engine works on it as
// on any file, and a reader sees what was written, as through a page cache. Beside that it records
// a history of events: each write when it is handed to the disk and again when it is complete, each
// change of a name or size, each sync when it begins and when it returns. A *cut* is a number of
// events: the machine stopped before the next. What then is on the disk:
//
// - What a sync covers is there: it has returned before the cut, and began after the write was
//   complete, or after the change was made. A sync of a file covers its contents and size, one of a
//   folder the names in it; neither covers the other.
// - Everything else may be there or not, by the seed: nothing; all; each write or change by itself;
//   each write up to a sector, or from one on; each sector of it by itself; or so that sectors
//   which were being written read as noise. Sectors are 512 or 4096 bytes. Of several writes to a
//   sector any may come last, an older one too. A file that was to grow has any of its sizes; what
//   was never written in it is zeros or noise. A rename is done or not, never half.
//
// That is more than file systems and drives do: journals keep the order of names, and drives write
// sectors whole. (Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014, has which
// file system promises what; Zheng et al., "Understanding the Robustness of SSDs under Power
// Fault", FAST 2013, shorn and reordered writes; TigerBeetle's src/testing/storage.zig damages the
// sectors of writes that are pending.) What it leaves out: sectors that go bad by themselves, which
// other tests do, and a drive that loses what it said was flushed, except where a test asks for it
// in order to see itself fail.
//
// One object a process, leaked on purpose; thread-safe. Stores are opened after begin() and closed
// before end(); crash() needs all of them closed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "base/file_descriptor.hpp"
#include "tiers/file_operations.hpp"

namespace spillover {

// Names and contents, as they would be read back.
struct DiskImage {
  struct Node {
    bool is_folder = false;
    std::vector<std::byte> contents;      // Of a file.
    std::map<std::string, size_t> names;  // Of a folder, to the numbers of nodes.
  };
  std::vector<Node> nodes;  // The first is the root folder.
};

struct DiskEvent {
  enum class Kind { kWrite, kWritten, kResize, kLink, kUnlink, kRename, kSync, kSynced };
  Kind kind;
  size_t node;                  // The file, or the folder of a name.
  size_t of = 0;                // Event that this one completes; the node that a name is for.
  uint64_t offset = 0;          // kWrite; the new size of kResize; 1 for kLink of a folder.
  std::vector<std::byte> data;  // kWrite.
  std::string name;             // kLink, kUnlink, kRename.
  std::string new_name;         // kRename.
};

// Immutable.
class DiskHistory {
 public:
  DiskHistory(DiskImage start, std::vector<DiskEvent> events)
      : start_(std::move(start)), events_(std::move(events)) {}

  size_t size() const { return events_.size(); }
  // "write 4096 bytes at 8192 of file 3", for messages.
  std::string describe(size_t event) const;

  struct Cut {
    size_t event_count;  // That happened.
    uint64_t seed;
    // What a broken disk, or a program without a sync, would be like: for seeing a test fail.
    enum class Ignored { kNone, kAll, kOne } ignored = Ignored::kNone;
    size_t ignored_event = 0;  // The kSynced of kOne.
  };
  // What is on the disk after the cut.
  DiskImage image(const Cut& cut) const;

 private:
  DiskImage start_;
  std::vector<DiskEvent> events_;
};

class SimulatedDisk : public FileOperations {
 public:
  static SimulatedDisk& instance();

  // An empty disk in the system's place.
  void begin();
  // Puts the system back.
  void end();

  size_t event_count() const;
  // What happened since begin() or the last crash(); the disk goes on.
  std::shared_ptr<DiskHistory> take_history() const;
  // The disk is what that history leaves, with a new history from there.
  void crash(const DiskHistory& history, const DiskHistory::Cut& cut);

  int make_folder(const char* path, mode_t mode) override;
  int open(int folder, const char* name, int flags, mode_t mode) override;
  int unlink(int folder, const char* name) override;
  int rename(int folder, const char* name, const char* new_name) override;
  int allocate(int file, uint64_t offset, uint64_t size_bytes) override;
  int truncate(int file, uint64_t size_bytes) override;
  int sync(int file, SyncKind kind) override;
  std::unique_ptr<TransferPlan> plan(int file, TransferDirection direction, std::byte* data,
                                     size_t size_bytes, uint64_t offset) override;

 private:
  class RecordedWrite;
  struct Node {
    bool is_folder = false;
    FileDescriptor file;  // Of a file, as long as the disk is this one.
    std::map<std::string, size_t> names;
  };

  void load(DiskImage image);
  size_t record(DiskEvent event);
  size_t find(const std::string& path) const;
  size_t lookup(size_t folder, const std::string& name) const;
  size_t make_node(size_t folder, const std::string& name, bool is_folder);
  int open_node(size_t node);
  size_t node_of(int file) const;

  mutable std::mutex mutex_;
  // Guarded by mutex_.
  std::vector<Node> nodes_;
  std::map<int, size_t> open_;  // Descriptors that were given out; stale ones are replaced.
  DiskImage start_;
  std::vector<DiskEvent> events_;
};

}  // namespace spillover
