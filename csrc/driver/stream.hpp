// CUDA streams: an owner, and questions about streams that others own.
//
// A Stream is move-only; its methods may be called from any thread. It must be destroyed before the
// process's end, or leaked: no static Stream.
#pragma once

#include <cstdint>

#include "driver/types.hpp"

namespace spillover {

class Event;

// A non-blocking stream (one that does not order with the legacy default stream).
class Stream {
 public:
  // A lower priority number is served first; 0 is the default.
  explicit Stream(int device, int priority = 0);
  ~Stream();
  Stream(Stream&& other) noexcept;
  Stream& operator=(Stream&& other) noexcept;
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  StreamHandle handle() const { return handle_; }
  int device() const { return device_; }

  // Blocks the host until the stream's work is complete.
  void synchronize() const;
  // The same for who undoes what failed: asks whatever the driver says of the context, and once
  // more after an error, which may be of earlier work.
  void settle() const noexcept;
  // Whether all work submitted so far is complete; does not block.
  bool is_idle() const;
  // Work submitted after this call starts after the event. Does not block the host.
  void wait(const Event& event) const;

 private:
  int device_ = -1;
  StreamHandle handle_ = nullptr;
};

// The legacy default stream has two handles (null and 1), the per-thread default stream one for all
// threads (2): this gives null, 2 or the handle itself.
StreamHandle normalize_stream(StreamHandle stream) noexcept;
bool is_per_thread_stream(StreamHandle stream) noexcept;

// A number that no other stream of the process ever gets, unlike its handle; 0 where the driver
// does not say (before CUDA 12.0). The device's context must be current. Throws DriverError for a
// handle that is not a stream.
uint64_t stream_identity(StreamHandle stream);

// The device of a stream that somebody has created. Any context may be current. Throws DriverError
// for a handle that is not a stream.
int stream_device(StreamHandle stream);

// Whether the stream records a graph. The device's context must be current.
bool stream_is_capturing(StreamHandle stream);

enum class StreamActivity {
  kIdle,  // everything submitted so far is complete
  kBusy,  // or a graph is being recorded, when nothing may be asked
};

// Asks a stream that is alive, without disturbing a capture. Does not block. Throws DriverError
// when the device has failed.
StreamActivity stream_activity(int device, StreamHandle stream);

}  // namespace spillover
