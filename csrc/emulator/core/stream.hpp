// A stream: a queue of operations that run in order, and what the checker knows of it.
//
// Shared by the handle table, by events that were recorded on it and by operations that wait for
// it, so that it outlives cuStreamDestroy for as long as it has work. Guarded by Machine::mutex,
// but for the fields that are constant after construction.
//
// Invariants: enqueued - completed = pending.size() + (running ? 1 : 0); a stream is in the
// scheduler's list of active streams exactly while its queue is not empty or it runs.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>

#include "emulator/core/operation.hpp"
#include "emulator/core/types.hpp"
#include "emulator/core/vector_clock.hpp"

namespace spillover::emulator {

struct Context;
struct StreamCapture;

enum class StreamKind { kLegacy, kPerThread, kCreated };

struct Stream {
  static constexpr std::size_t kNotActive = ~std::size_t{0};

  // Constant after construction.
  std::uint64_t id = 0;  // never used again, unlike the handle
  CUstream handle = nullptr;
  StreamKind kind = StreamKind::kCreated;
  Context* context = nullptr;
  int device = 0;
  unsigned flags = 0;
  int priority = 0;
  ActorId actor = kHostActor;

  // The queue; maintained by the scheduler.
  std::deque<Operation> pending;
  Ticket enqueued = 0;
  Ticket completed = 0;
  bool running = false;
  bool running_host_function = false;
  bool destroyed = false;
  std::size_t active_index = kNotActive;
  Ticket host_function_ticket = 0;  // of the last host function enqueued
  TimePoint host_function_due;      // when the background thread takes it up
  unsigned delay_us = 0;            // by which every body takes longer

  // While the stream is being captured; see Captures.
  std::shared_ptr<StreamCapture> capture;

  // Polling; see Events::query and Streams::query.
  int query_count = 0;

  // The checker's.
  VectorClock clock;
  std::uint64_t host_version_seen = 0;

  // Changes with every operation and every wait. The other two are the default stream's version
  // that this stream is ordered after already, and this stream's version that the default stream is
  // ordered after; they spare the hot path a wait for every operation.
  std::uint64_t version = 0;
  std::uint64_t default_seen = 0;
  std::uint64_t seen_by_default = 0;

  bool is_blocking() const {
    return kind != StreamKind::kLegacy && (flags & CU_STREAM_NON_BLOCKING) == 0;
  }
  bool idle() const { return completed == enqueued; }
};

}  // namespace spillover::emulator
