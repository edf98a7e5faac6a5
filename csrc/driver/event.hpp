// CUDA events without timing: marks in a stream that the host or another stream can wait for.
//
// Move-only. Methods may be called from any thread, but one thread at a time records. An event may
// be destroyed while its mark is pending, and it outlives the stream that it was recorded on.
#pragma once

#include "driver/types.hpp"

namespace spillover {

// What became of an attempt to record an event on a stream that somebody else owns, or to make the
// stream wait for one.
enum class RecordOutcome {
  kRecorded,
  kStreamCapturing,  // the stream records a graph: an event would become a part of it
  kFailed,           // anything else, such as a device that has failed
};

// What a host thread does that waits for an event: burn its core, which is fastest, or sleep.
enum class EventWait { kSpin, kSleep };

class Event {
 public:
  explicit Event(int device, EventWait wait = EventWait::kSpin);
  ~Event();
  Event(Event&& other) noexcept;
  Event& operator=(Event&& other) noexcept;
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  EventHandle handle() const { return handle_; }
  int device() const { return device_; }

  // Marks the stream's work up to now. Throws DriverError.
  void record(StreamHandle stream);

  // The same for a stream that is alive and may be capturing.
  RecordOutcome try_record(StreamHandle stream) noexcept;

  // What is submitted to the stream from now on waits for the mark; the host does not. The stream
  // is alive and may be capturing: then nothing happens, nor does where the driver refuses.
  RecordOutcome try_put_before(StreamHandle stream) const noexcept;

  // The same for a stream that is alive and does not capture. Throws DriverError.
  void put_before(StreamHandle stream) const;

  // Whether the mark was reached; true for an event that was never recorded. Does not block.
  bool is_complete() const;

  // Blocks the host until the mark is reached.
  void synchronize() const;

 private:
  int device_ = -1;
  EventHandle handle_ = nullptr;
};

// Blocks the host until the mark of an event that somebody else owns, such as torch, is reached.
// The owner keeps the event alive until this returns. device is the one it was made on.
void synchronize_event(int device, EventHandle event);

}  // namespace spillover
