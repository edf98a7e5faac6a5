// Stream capture: instead of running, work that is put on a capturing stream becomes nodes of a
// graph. What CUDA forbids meanwhile fails as CUDA documents it, and invalidates the capture.
//
// Owned by the Machine; called with its mutex held, which is never let go of. The mode of a thread
// is its own.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <thread>
#include <vector>

#include "emulator/core/graph.hpp"
#include "emulator/core/stream.hpp"
#include "emulator/core/types.hpp"

namespace spillover::emulator {

class Machine;
struct Event;

// What memory would hold if the captured work had run. Operators that are captured run once on it,
// for the shapes and values that later ones need, while the device's own memory stays as it is.
// Reads of bytes that nothing captured has written are of the device's memory.
class CaptureMemory {
 public:
  explicit CaptureMemory(Machine* machine) : machine_(machine) {}

  // Bytes that may be written, with what is known of them; valid until the capture ends.
  std::byte* write(Address address, std::size_t size_bytes);

  // Where the bytes are to be read: here, or in the device's memory.
  const std::byte* read(Address address, std::size_t size_bytes);

  // The same for a copy or memset that was captured.
  void apply(const Copy& copy);
  void apply(const Fill& fill);

 private:
  struct Part {
    std::size_t size_bytes = 0;
    std::unique_ptr<std::byte[]> bytes;
  };

  std::map<Address, Part>::iterator first_overlap(Address address);

  Machine* machine_;
  std::map<Address, Part> parts_;  // disjoint
  std::vector<std::unique_ptr<std::byte[]>> replaced_;
};

struct Capture {
  explicit Capture(Machine* machine) : memory(machine) {}

  cuuint64_t id = 0;
  CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
  std::thread::id thread;
  StreamRef origin;
  Graph* graph = nullptr;
  bool is_new_graph = true;
  bool is_valid = true;
  bool is_over = false;
  std::vector<StreamRef> members;  // the origin and all that were forked into it
  CaptureMemory memory;
};

// The part of a capture that one stream has.
struct StreamCapture {
  std::shared_ptr<Capture> capture;
  std::vector<GraphNode*> tail;           // what the stream's next node depends on
  std::vector<CUgraphNode> tail_handles;  // as cuStreamGetCaptureInfo showed it
  std::vector<CUgraphEdgeData> tail_edges;
};

class Captures {
 public:
  explicit Captures(Machine* machine) : machine_(machine) {}

  static CUstreamCaptureMode& thread_mode();

  // Whether captured copies are carried out in CaptureMemory: only operators look at it.
  static bool follows_values();

  bool any() const { return !active_.empty(); }

  // Adds to an existing graph, after some of its nodes, where one is given.
  CUresult begin(const StreamRef& stream, CUstreamCaptureMode mode, Graph* graph,
                 std::vector<GraphNode*> dependencies);
  // What is left of an invalid capture dies with the garbage, once the mutex was let go of.
  CUresult end(const StreamRef& stream, CUgraph* graph, std::shared_ptr<Graph>* garbage);
  void abandon(const StreamRef& stream);  // the stream is destroyed

  // Whether work may be put on the stream.
  CUresult admit_work(const StreamRef& stream) {
    return active_.empty() ? CUDA_SUCCESS : check_work(stream);
  }
  // Whether the host may wait for the stream, or ask for its state.
  CUresult admit_wait(const StreamRef& stream) {
    return active_.empty() ? CUDA_SUCCESS : check_wait(stream);
  }
  CUresult admit_event_wait(const Event& event);
  CUresult admit_device_wait(int device);  // -1: all devices
  // Whether the thread may make a call that CUDA calls potentially unsafe.
  CUresult admit_unsafe_call() { return active_.empty() ? CUDA_SUCCESS : check_unsafe_call(); }

  // CUDA_SUCCESS, or that the legacy stream would be ordered with a capture.
  CUresult status(const StreamRef& stream, CUstreamCaptureStatus* status) const;

  // Adds a node to the capture that the stream is in.
  GraphNode* add(const StreamRef& stream, const char* name, NodeWork work);

  // What the stream's next node depends on: these, or these as well.
  static void change_tail(const StreamRef& stream, const std::vector<GraphNode*>& nodes,
                          bool replaces);

  // On a stream that is in a capture, or for an event that is.
  CUresult record(const StreamRef& stream, CUevent handle, Event* event, unsigned flags);
  CUresult wait(const StreamRef& stream, CUevent handle, const Event& event, unsigned flags);

  void invalidate(Capture* capture) { capture->is_valid = false; }

 private:
  CUresult check_work(const StreamRef& stream);
  CUresult check_wait(const StreamRef& stream);
  CUresult check_unsafe_call();
  bool invalidate_blocking(int device);
  void close(const std::shared_ptr<Capture>& capture);

  Machine* machine_;
  std::vector<std::shared_ptr<Capture>> active_;
  cuuint64_t next_id_ = 1;
};

}  // namespace spillover::emulator
