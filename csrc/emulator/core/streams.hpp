// All streams: handles, default streams, and how work is put on them in the order that CUDA
// promises.
//
// Owned by the Machine; called with its mutex held. Functions with a Lock& parameter may let go of
// it, the others never do.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

#include "emulator/core/context.hpp"
#include "emulator/core/handle_table.hpp"
#include "emulator/core/host_threads.hpp"
#include "emulator/core/scheduler.hpp"
#include "emulator/core/stream.hpp"
#include "emulator/core/types.hpp"
#include "emulator/core/vector_clock.hpp"

namespace spillover::emulator {

class Streams {
 public:
  Streams(Machine* machine, int device_count);

  StreamRef create(Context* context, unsigned flags, int priority);

  // A stream without a handle, for a branch of a graph.
  StreamRef create_lane(Context* context);

  // The handle dies at once; queued work still runs, and what the stream holds is freed after it.
  void destroy(CUstream handle);
  void close(const StreamRef& stream);  // the same for a per-thread default stream

  // The stream that a handle means to the calling thread: 0 and 1 are the legacy default stream of
  // the current context's device and 2 its per-thread default stream. CUDA_ERROR_INVALID_HANDLE, or
  // CUDA_ERROR_INVALID_CONTEXT where a default stream is meant and no context is current.
  CUresult find(CUstream handle, StreamRef* stream);

  const StreamRef& legacy(int device) const { return legacy_[static_cast<std::size_t>(device)]; }

  // Note [Launching]: each operation is put on its stream in two steps. prepare orders the stream
  // after the host and after the default stream and returns the operation's ticket, under which its
  // accesses are then recorded; submit queues it. The lock is held from the one to the other.
  Ticket prepare(const StreamRef& stream);
  void submit(Lock& lock, const StreamRef& stream, Operation operation);

  // submit without running anything: for the operations of a graph, which are queued in one go.
  void append(const StreamRef& stream, Operation operation);

  // For an operator that the calling thread performs itself: waits for all that it depends on and
  // counts it.
  void perform(Lock& lock, const StreamRef& stream);

  // The host may have learnt of new things since the operator began: its outputs' allocator polled
  // events.
  void order_after_host(Stream* stream);

  // Waits for the stream and lets the host know of its work.
  void synchronize(Lock& lock, const StreamRef& stream);
  void synchronize_device(Lock& lock, int device);  // -1: all devices

  // CUDA_SUCCESS when the stream is done. Otherwise CUDA_ERROR_NOT_READY, and every few calls some
  // progress.
  CUresult query(Lock& lock, const StreamRef& stream);

  // Makes stream wait for a ticket of another one, whose clock at that time is given.
  void wait_for(const StreamRef& stream, const StreamRef& other, Ticket ticket,
                const VectorClock& clock);

  // Ordering through a value in memory: who waits for it is ordered after the last write of it that
  // was enqueued before. A write that is enqueued later cannot be known yet.
  void release_value(const Stream& stream, Address address);
  void acquire_value(Stream* stream, Address address);
  void forget_values(Address address, std::size_t size_bytes);

  // Called when a destroyed stream's last work is done.
  void retire(const Stream& stream);

  // Orders the stream with its device's default stream and after the host without launching
  // anything.
  void order_with_default(const StreamRef& stream);

  // What the calling thread and all others know of the streams (host_threads.hpp).
  HostThreads& threads() { return threads_; }
  void host_learns(const VectorClock& clock) {
    if (tracks_order_) threads_.learn(clock);
  }
  void all_learn(const VectorClock& clock) {
    if (tracks_order_) threads_.learn_for_all(clock);
  }

  // Counts the host's accesses to pinned memory.
  Ticket host_tick() { return ++host_tick_; }

  std::size_t live_count() const { return table_.size(); }

 private:
  // Number of a destroyed stream, kept until the host knows of its last work.
  struct RetiredActor {
    ActorId actor;
    Ticket last_tick;
    int device;
  };

  StreamRef make(Context* context, unsigned flags, int priority, StreamKind kind);
  StreamRef per_thread(Context* context);
  void take_actor(Stream* stream);
  void depend(const StreamRef& stream, const StreamRef& other, std::uint64_t* seen);

  // The streams whose work a synchronisation with this one covers: itself, and with the legacy
  // stream those that order with it.
  std::vector<StreamRef> covered_by(const StreamRef& stream) const;
  VectorClock clock_of(const std::vector<StreamRef>& streams) const;

  // What everything enqueued so far on a device adds up to.
  VectorClock clock_of_device(int device) const;

  Machine* machine_;
  bool tracks_order_;
  HandleTable<StreamRef> table_;
  std::vector<StreamRef> legacy_;
  std::vector<std::vector<StreamRef>>
      blocking_;  // by device: streams that order with the legacy one
  // By device: what such streams did before they were destroyed, and what the legacy stream's next
  // operation will be ordered after.
  std::vector<VectorClock> ended_;
  std::uint64_t next_id_ = 0;
  ActorId next_actor_ = kHostActor + 1;
  std::vector<RetiredActor> retired_;
  std::map<Address, VectorClock> value_clocks_;
  HostThreads threads_;
  Ticket host_tick_ = 0;
};

}  // namespace spillover::emulator
