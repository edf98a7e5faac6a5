// Events: a mark in a stream (its ticket and what the stream knew at that time).
//
// Owned by the Machine; called with its mutex held. Functions with a Lock& parameter may let go of
// it.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#include "emulator/core/context.hpp"
#include "emulator/core/handle_table.hpp"
#include "emulator/core/operation.hpp"
#include "emulator/core/stream.hpp"
#include "emulator/core/types.hpp"
#include "emulator/core/vector_clock.hpp"

namespace spillover::emulator {

class Machine;

struct Event {
  Context* context = nullptr;
  unsigned flags = 0;
  StreamRef stream;  // nullptr: never recorded, which counts as complete
  Ticket ticket = 0;
  VectorClock clock;
  bool all_know = false;                       // every host thread has this record's clock
  std::shared_ptr<TimePoint> time;             // nullptr with CU_EVENT_DISABLE_TIMING
  std::shared_ptr<std::int64_t> virtual_time;  // the same on the virtual clock, where that is on
  int query_count = 0;

  bool is_complete() const { return stream == nullptr || stream->completed >= ticket; }
  bool has_timing() const { return (flags & CU_EVENT_DISABLE_TIMING) == 0; }
};

class Events {
 public:
  explicit Events(Machine* machine);

  CUevent create(Context* context, unsigned flags);
  void destroy(CUevent handle);

  // nullptr for a handle that is no live event.
  Event* find(CUevent handle);

  CUresult record(Lock& lock, Event* event, const StreamRef& stream);

  // The event may be destroyed or recorded again while this waits; it waits for the record of the
  // call.
  void synchronize(Lock& lock, Event* event);

  CUresult query(Lock& lock, CUevent handle);
  void make_wait(const StreamRef& stream, const Event& event);
  static CUresult elapsed(const Event& start, const Event& end, float* milliseconds);

  std::size_t live_count() const { return table_.size(); }

 private:
  Machine* machine_;
  HandleTable<std::unique_ptr<Event>> table_;
};

}  // namespace spillover::emulator
