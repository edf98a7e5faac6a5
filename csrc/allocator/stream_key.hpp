// Which stream a block belongs to or is used on.
//
// A handle alone does not name a stream: a destroyed stream's handle is given to a new one while
// the old one's work still runs, and the per-thread default stream has one handle for all threads.
// Values only; identify_stream() is thread-safe.
#pragma once

#include <compare>
#include <cstdint>

#include "driver/types.hpp"

namespace spillover {

struct StreamKey {
  StreamHandle handle = nullptr;
  // The driver's number of the stream; the thread's for the per-thread default stream; 0 for the
  // legacy default stream and where the driver does not number streams.
  uint64_t identity = 0;

  auto operator<=>(const StreamKey&) const = default;
};

// Asks the driver about streams other than the default ones. Throws DriverError for a handle that
// is not a stream.
StreamKey identify_stream(int device, StreamHandle stream);

// Throws StateError for a stream that records a graph, which this pool does not serve.
void check_not_capturing(int device, StreamHandle stream);

// False for another thread's default stream, which this thread cannot name.
bool reachable_from_this_thread(const StreamKey& key);

}  // namespace spillover
