// Events: a mark in a stream (its ticket and what the stream knew at that time).
//
// Owned by the Machine; called with its mutex held. Functions with a Lock& parameter may let go of
// it.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "emulator/core/context.hpp"
#include "emulator/core/handle_table.hpp"
#include "emulator/core/operation.hpp"
#include "emulator/core/shared_mark.hpp"
#include "emulator/core/stream.hpp"
#include "emulator/core/types.hpp"
#include "emulator/core/vector_clock.hpp"

namespace spillover::emulator {

class Machine;
struct Capture;
struct GraphNode;

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
  // Where it was last recorded on a stream that was being captured: after which nodes.
  std::shared_ptr<Capture> capture;
  std::vector<GraphNode*> capture_nodes;

  // Of an interprocess event, and the number of the record that the fields above describe. Where
  // the mark counts more records, another process made the last one.
  std::shared_ptr<SharedMark> mark;
  std::uint64_t record_number = 0;

  bool is_recorded_elsewhere() const { return mark != nullptr && mark->records() > record_number; }
  bool is_complete() const {
    if (is_recorded_elsewhere()) return mark->reached(mark->records());
    return stream == nullptr || stream->completed >= ticket;
  }
  bool has_timing() const { return (flags & CU_EVENT_DISABLE_TIMING) == 0; }
};

class Events {
 public:
  explicit Events(Machine* machine);

  // nullptr where there are too many interprocess events.
  CUevent create(Context* context, unsigned flags);

  // An event of another process.
  CUevent import(Context* context, std::shared_ptr<SharedMark> mark);
  void destroy(CUevent handle);

  // nullptr for a handle that is no live event.
  Event* find(CUevent handle);

  CUresult record(Lock& lock, Event* event, const StreamRef& stream);

  // The same for an event of the stream's device, without running anything.
  void mark(Event* event, const StreamRef& stream);

  // The event may be destroyed or recorded again while this waits; it waits for the record of the
  // call.
  void synchronize(Lock& lock, Event* event);

  CUresult query(Lock& lock, CUevent handle);
  void make_wait(const StreamRef& stream, const Event& event);
  static CUresult elapsed(const Event& start, const Event& end, float* milliseconds);

  std::size_t live_count() const { return table_.size(); }

 private:
  CUevent insert(std::unique_ptr<Event> event);
  void synchronize_elsewhere(Lock& lock, const Event& event);

  Machine* machine_;
  HandleTable<std::unique_ptr<Event>> table_;
};

}  // namespace spillover::emulator
