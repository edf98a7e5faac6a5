// Where the bytes of one chunk of a payload are, and which transfers of them are under way.
//
// Bookkeeping alone: it knows neither a driver, nor memory, nor time, so it can be tested by
// itself. The engine's mutex guards it. A transition that is not legal in the present state is a
// mistake of the engine and ends the process.
//
// Note [Residency]. A chunk has at most one copy in host memory and at most one on disk:
//
//   host   none ──► leaving ──► valid ◄── reading        (leaving: from the device)
//   disk   none ──► writing ──► valid
//
// Put together they are the states that people speak of: device → leaving → host → writing → host
// and disk → disk → reading → host and disk, and any number of readers (copies to the device) at
// any time. What holds always:
//   1. Reading needs a valid copy on disk, which stays valid meanwhile and where reading fails.
//   2. Writing needs a copy on the host, valid or leaving (the write then waits for the copy),
//   which
//      stays until the write is over. A write that fails costs nothing.
//   3. The host's copy goes only while nobody reads it, and only if the disk's is valid or the
//   chunk
//      was dropped.
// So there is a valid copy at any time from the end of the first transfer on, or a transfer under
// way that makes one; and a chunk may be dropped in each state: what is under way then ends by
// itself, and is_over() tells when nothing is.
#pragma once

#include <cstddef>

namespace spillover {

enum class HostCopy { kNone, kLeaving, kReading, kValid };
enum class DiskCopy { kNone, kWriting, kValid };

class Residency {
 public:
  HostCopy host() const { return host_; }
  DiskCopy disk() const { return disk_; }
  size_t readers() const { return readers_; }
  bool is_dropped() const { return is_dropped_; }

  // From the device.
  void begin_leaving();
  void has_left();
  void leaving_failed();

  // To the disk.
  void begin_writing();
  void has_written();
  void writing_failed();

  // From the disk.
  void begin_reading();
  void has_read();
  void reading_failed();

  // To the device. Who is going to read may say so before there is a copy on the host.
  void add_reader();
  void remove_reader();

  // The host's copy goes.
  bool can_evict() const;
  void evict();

  // Nobody wants the bytes any more.
  void drop();
  // Nothing is under way: all that a dropped chunk holds may be given up.
  bool is_over() const;

  // Whether a copy to the device can be put on a stream now, behind a copy-out that may be under
  // way.
  bool is_at_hand() const { return host_ == HostCopy::kValid || host_ == HostCopy::kLeaving; }
  // Whether only the host has the bytes and nobody writes them to disk.
  bool is_dirty() const { return is_at_hand() && disk_ == DiskCopy::kNone; }
  // Whether the bytes are on disk alone, and nobody reads them.
  bool is_on_disk_only() const { return host_ == HostCopy::kNone && disk_ == DiskCopy::kValid; }

  // What people call the state, such as "leaving"; for messages and tests.
  const char* name() const;

  // Whether the equations of Note [Residency] hold.
  bool is_valid() const;

 private:
  HostCopy host_ = HostCopy::kNone;
  DiskCopy disk_ = DiskCopy::kNone;
  size_t readers_ = 0;
  bool is_dropped_ = false;
};

}  // namespace spillover
