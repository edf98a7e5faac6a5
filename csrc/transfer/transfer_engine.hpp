// Moves payloads between one device, pinned host memory and disks.
//
// put() copies bytes out of the device; where the host's budget is reached, those whose next use is
// farthest go on to the disk store, if there is one. fetch() copies them back, from wherever they
// are. Copies run on the two streams of the device (copy_streams.hpp); what they read and write is
// held until they are over.
//
// Every method may be called from any thread, in a process that was not forked. put() and fetch()
// block for back-pressure alone: while copies out hold too much device memory, and while no host
// memory is free or can be made free. Tickets tell of the rest. Threads of the disk store wait for
// copies out; one thread of the engine's own puts on the copy-in stream what comes from the disk.
//
// Note [Who sees that a copy is over]. No thread waits for copies: each call of the engine asks for
// the oldest marks of both directions, in the order of the streams, and lets go of what the passed
// ones held; who needs memory back waits for just enough of them. A thread that waits would give
// memory back without a call. But it would have no time of its own where time is virtual: memory
// would come back when the thread really ran, before the copy was over in the program's time, and
// what a run needs would look smaller than it is; the emulator's lazy schedules would never be
// lazy; and it would want the interpreter's lock whenever it lets go of a tensor.
//
// Note [Time of detached work]. For the same reason disk requests are made on the caller's thread,
// as far as memory for them is free: at the caller's time. fetch() waits for memory until at least
// one request of its own is under way, so whatever the engine's thread does later comes after
// something that it waited for.
//
// Lock order: mutex_ is a leaf but for the mutexes of CopyMarks. No driver, disk or pool call is
// made under it, and no owner of memory is let go.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <span>
#include <thread>
#include <tuple>
#include <vector>

#include "base/annotated_mutex.hpp"
#include "base/bytes.hpp"
#include "driver/copy.hpp"
#include "trace/tracks.hpp"
#include "transfer/copy_streams.hpp"
#include "transfer/payload.hpp"
#include "transfer/transfer_stats.hpp"
#include "transfer/transfer_ticket.hpp"

namespace spillover {

struct TransferOptions {
  int device = 0;
  size_t host_bytes_max = SIZE_MAX;  // Of payloads in host memory.
  // With a disk at least so much host memory is used, for the passage between device and disk.
  size_t staging_bytes = 64 * kMiB;
  size_t chunk_bytes = 16 * kMiB;
  size_t leaving_bytes_max = 256 * kMiB;  // Device memory that copies out hold; one may be larger.
  size_t prefetch_bytes = 256 * kMiB;     // Of payloads that are used next.
};

// Keeps memory alive that a copy works on.
using MemoryOwner = std::shared_ptr<void>;

struct DeviceRange {
  DeviceAddress address = 0;
  size_t size_bytes = 0;
  MemoryOwner owner;
};

// What is put, and when it will be fetched, where that is known.
struct PutSource {
  DeviceRange range;
  uint64_t next_use = Payload::kNoUse;
};

// Where a payload is to arrive; target has room for it.
struct FetchTarget {
  std::shared_ptr<Payload> payload;
  DeviceRange target;
};

// A copy between the device and pinned memory of the caller's.
struct PinnedCopy {
  DeviceRange device;  // The size counts.
  void* host = nullptr;
  MemoryOwner host_owner;
};

struct TransferStats {
  const TransferCounters& counters;
  size_t host_bytes = 0;  // Of payloads in host memory, those on their way included.
  size_t host_bytes_peak = 0;
  size_t dirty_bytes = 0;    // Of those, neither on disk nor on the way there.
  size_t leaving_bytes = 0;  // Device memory that copies out hold.
  size_t writing_bytes = 0;
  size_t reading_bytes = 0;
  size_t waiting_pieces = 0;  // Of fetches, not yet on a stream.
  size_t copies_out = 0;      // Batches on the streams.
  size_t copies_in = 0;
};

class TransferEngine : public std::enable_shared_from_this<TransferEngine> {
 public:
  // disk may be null, and outlives the engine. Throws ConfigError, DriverError.
  static std::shared_ptr<TransferEngine> create(const TransferOptions& options,
                                                std::shared_ptr<HostPool> pool, DiskStore* disk);
  ~TransferEngine();
  TransferEngine(const TransferEngine&) = delete;
  TransferEngine& operator=(const TransferEngine&) = delete;

  struct PutResult {
    std::vector<std::shared_ptr<Payload>> payloads;
    std::shared_ptr<TransferTicket> ticket;
  };

  // Copies each range to a payload of its own, after what is on the stream `after` now. The ticket
  // is done when all have left the device; the ranges must not change before. Whoever holds a
  // payload calls drop() at its end. Throws HostOutOfMemoryError where there is no room, what the
  // disk said where that is why, DriverError; nothing is kept then.
  PutResult put(std::vector<PutSource> sources, StreamHandle after);

  // Copies payloads to the device, after what is on the stream `after` now: the last use of the
  // targets' memory. Of two that wait for memory or the disk, the one with the higher priority goes
  // first. Throws StateError for a payload that was dropped, and like put() where not even a
  // request to the disk could be made; the targets are then in use by nobody.
  std::shared_ptr<TransferTicket> fetch(const std::vector<FetchTarget>& wanted, StreamHandle after,
                                        int priority);

  // Copies that leave payloads alone. Batched; throws DriverError.
  std::shared_ptr<TransferTicket> copy(std::vector<PinnedCopy> copies, CopyDirection direction,
                                       StreamHandle after);

  // Nobody fetches the payload any more; fetches under way still arrive. Any state, may be
  // repeated.
  void drop(const std::shared_ptr<Payload>& payload) noexcept;

  // Takes back what of a fetch is not yet on a stream. False where the transfer was over before.
  bool cancel(const std::shared_ptr<TransferTicket>& ticket);

  // When payloads will be fetched, as growing numbers of the program's choosing; Payload::kNoUse:
  // not known. A fetch makes a payload's use unknown again, and its number the present position.
  void set_next_use(const std::shared_ptr<Payload>& payload, uint64_t next_use);
  // Later uses are ahead; starts to read those from disk.
  void advance(uint64_t position);
  uint64_t position() const;

  // Lets go of what copies that are over held. Returns device memory let go of. Blocks until that
  // is wanted_bytes, or those copies out are over that are under way now.
  size_t collect(size_t wanted_bytes = 0);

  // Owners of memory that is not in use any more. The engine never lets go of one itself: what
  // that runs is the caller's business.
  std::vector<MemoryOwner> take_released();

  // Blocks until nothing is under way. Throws the error of a disk request that nobody has heard of
  // yet; the bytes are on the host.
  void synchronize();

  // Refuses new calls, fails what is not on a stream, and waits for the rest. May be called again.
  void close() noexcept;

  TransferStats stats() const;
  // Device memory that copies out hold: as in stats(), for who asks at each put.
  size_t leaving_bytes() const;
  // Where the bytes are, for people.
  const char* describe(const std::shared_ptr<Payload>& payload) const;
  const TransferOptions& options() const { return options_; }

 private:
  using Lock = std::unique_lock<AnnotatedMutex>;

  struct ChunkRef {
    std::shared_ptr<Payload> payload;
    size_t index = 0;
    Chunk& chunk() const { return payload->chunks[index]; }
  };
  // Copies on a stream, up to a mark.
  struct Flight {
    std::shared_ptr<CopyMark> mark;
    std::vector<ChunkRef> chunks;
    std::vector<MemoryOwner> owners;
    size_t device_bytes = 0;
    size_t copied_bytes = 0;  // For the trace.
    int64_t issued_ns = 0;
  };
  // Copies out that are about to be put on the stream.
  struct Departure {
    std::vector<ChunkRef> chunks;
    std::vector<HostDeviceCopy> copies;
    std::vector<MemoryOwner> owners;
    size_t size_bytes = 0;
    size_t device_bytes = 0;  // Of the owners' memory.

    void add_owner(MemoryOwner owner, size_t owned_bytes) {
      owners.push_back(std::move(owner));
      device_bytes += owned_bytes;
    }
  };
  // A chunk of a fetch that is not on a stream yet. Its chunk has a reader.
  struct Piece {
    ChunkRef ref;
    DeviceAddress target = 0;
    std::shared_ptr<TransferTicket> ticket;
    std::shared_ptr<CopyMark> ready;  // Of the target's memory.
    MemoryOwner owner;
  };
  using PieceKey = std::tuple<int64_t, uint64_t, size_t>;  // Descending priority, fetch, piece.
  struct DiskWork {
    ChunkRef ref;
    std::shared_ptr<Ticket> ticket;
  };
  // What a thread waits for: one of them.
  struct Wait {
    std::shared_ptr<CopyMark> departure;
    std::shared_ptr<CopyMark> arrival;
    std::optional<DiskWork> write;
    std::optional<DiskWork> read;
  };
  // What must not be let go of under the mutex. Declared before the lock.
  struct Garbage {
    std::vector<HostBuffer> hosts;
    std::vector<std::shared_ptr<DiskPayload>> stored;
    std::vector<std::shared_ptr<CopyMark>> marks;
  };
  class ActiveCall;
  // Whether a thread of the program asks, or the engine's own; see Note [Time of detached work].
  enum class Asker { kProgram, kEngine };

  TransferEngine(const TransferOptions& options, std::shared_ptr<HostPool> pool, DiskStore* disk);

  // transfer_engine.cpp
  std::shared_ptr<CopyMark> record_ready(StreamHandle after);
  std::shared_ptr<Payload> make_payload(size_t size_bytes, uint64_t next_use);
  void check_mine(const Payload& payload) const;
  void wait_for_departures(size_t size_bytes);
  void put_chunks(const PutResult& result, std::vector<PutSource>& sources,
                  const std::shared_ptr<CopyMark>& ready);
  void add_to_batch(Departure& batch, const ChunkRef& ref, DeviceAddress source);
  void depart(Departure& batch, TransferTicket* ticket);
  void undo_departure(Departure& batch) noexcept;
  void drain() noexcept;

  // transfer_bookkeeping.cpp
  template <class Change>
  void change(Chunk& chunk, Change change);
  // With the mutex held: memory was let go of, or something is under way that may free some.
  void announce() {
    ++changes_;
    changed_.notify_all();
  }
  void take_host(Payload& payload, Chunk& chunk, HostBuffer&& host);
  void release_host(Payload& payload, Chunk& chunk, Garbage& garbage);
  void settle(Payload& payload, Chunk& chunk, Garbage& garbage);
  void finish_flight(Flight&& flight, CopyDirection direction, Garbage& garbage);
  void trace_flight(const Flight& flight, CopyDirection direction) noexcept;
  void collect_flights(CopyDirection direction);
  void collect_disk_work();
  void finish_write(const DiskWork& work) noexcept;
  std::exception_ptr finish_read(const DiskWork& work) noexcept;
  void remove_reader(const ChunkRef& ref) noexcept;
  void reorder(Payload& payload, uint64_t next_use);

  // transfer_memory.cpp
  static constexpr uint64_t kAnyUse = 0;  // Needed before all that is there.
  static constexpr uint64_t kLastRequest = UINT64_MAX;
  // How often a request looks again because of what others have done meanwhile. It may lose to them
  // many times in a row, and they could go on for ever.
  static constexpr int kRetriesMax = 1000;
  size_t limit_bytes() const;
  std::optional<HostBuffer> try_acquire(size_t size_bytes, uint64_t needed_at, uint64_t since,
                                        std::exception_ptr* error = nullptr);
  HostBuffer acquire(size_t size_bytes);
  std::optional<HostBuffer> acquire_unless(size_t size_bytes, const std::function<bool()>& is_moot);
  uint64_t changes() const;
  uint64_t next_request();
  bool help_to_memory(size_t size_bytes, uint64_t since, Asker asker);
  [[noreturn]] void throw_no_memory(size_t size_bytes, uint64_t since,
                                    const std::exception_ptr& error);
  bool evict_farthest(uint64_t needed_at, uint64_t since, Garbage& garbage);
  bool start_write(uint64_t since, uint64_t needed_at);
  void make_room_after(uint64_t needed_at);
  void write_behind();
  std::optional<Wait> find_wait() const;
  bool wait_for_anything();
  void perform(const Wait& wait, Asker asker);
  void collect_arrivals_for_engine();
  void finish_passed(const std::shared_ptr<CopyMark>& mark, CopyDirection direction);
  void prefetch();

  // transfer_arrivals.cpp
  std::vector<Piece> claim(const std::vector<FetchTarget>& wanted,
                           const std::shared_ptr<TransferTicket>& ticket,
                           const std::shared_ptr<CopyMark>& ready, std::vector<Piece>& later);
  void issue_all(std::vector<Piece>& pieces);
  void issue(std::span<Piece> pieces);
  bool start_read(const ChunkRef& ref, HostBuffer&& host, TransferTicket* ticket);
  void start_first_reads(std::span<Piece> pieces);
  void enqueue(std::vector<Piece>& pieces, int priority);
  void give_up(std::span<Piece> pieces, const std::exception_ptr& error) noexcept;
  void serve() noexcept;
  void serve_one(Lock& lock);
  enum class PieceOutcome { kOver, kWaits };
  PieceOutcome serve_piece(std::span<Piece> piece);
  void start_waiting_reads();

  // What the engine's thread looks at in one go.
  static constexpr size_t kWaitingReadsMax = 64;

  const uint64_t number_;  // Of this engine; no other one of the process ever has it.
  const TransferOptions options_;
  const std::shared_ptr<HostPool> pool_;
  DiskStore* const disk_;
  CopyStreams& streams_;
  const std::shared_ptr<CopyMarks> marks_;
  const std::shared_ptr<TransferCounters> counters_;
  LazyTrack out_track_;
  LazyTrack in_track_;

  mutable AnnotatedMutex mutex_;
  std::condition_variable_any changed_;  // Something below has.
  // Guarded by mutex_. Invariants: host_bytes_ is the sum over chunks with memory and memory being
  // allocated; on_host_ has the payloads with host_chunks > 0, by_use_ those with a known next use
  // that are not dropped; a chunk's readers are its pieces and its flights in.
  std::deque<Flight> departures_;  // In the order of the stream, but for simultaneous calls.
  std::deque<Flight> arrivals_;
  std::vector<DiskWork> writes_;
  std::vector<DiskWork> reads_;
  std::map<PieceKey, Piece> pieces_;
  std::set<Payload*, SoonerUse> on_host_;
  std::set<Payload*, SoonerUse> by_use_;
  std::vector<MemoryOwner> released_;
  uint64_t position_ = 0;
  uint64_t payloads_made_ = 0;
  uint64_t fetches_made_ = 0;
  uint64_t changes_ = 0;   // That were announced.
  uint64_t requests_ = 1;  // For host memory that had to wait, counted from 1.
  size_t host_bytes_ = 0;
  size_t host_bytes_peak_ = 0;
  size_t dirty_bytes_ = 0;
  size_t writing_bytes_ = 0;
  size_t reading_bytes_ = 0;
  size_t leaving_bytes_ = 0;
  std::exception_ptr disk_error_;  // The last one, until somebody hears of it.
  uint64_t disk_error_at_ = 0;     // Number of the request before it.
  size_t serving_ = 0;             // Pieces that the engine's thread has taken out of pieces_.
  size_t active_calls_ = 0;
  size_t blocked_calls_ = 0;  // Of those, which wait for what others do.
  bool is_closed_ = false;
  bool is_stopping_ = false;
  // Constant once made, under mutex_. On the heap so that a forked child can leave it alone.
  std::unique_ptr<std::thread> thread_;
  std::mutex close_mutex_;  // Taken before mutex_, held while close() waits.
};

}  // namespace spillover
