// Which stream a block belongs to or is used on.
//
// A handle alone does not name a stream: a destroyed stream's handle is given to a new one while
// the old one's work still runs, and the per-thread default stream has one handle for all threads.
//
// Note [Foreign streams]. The driver must not be asked about a stream that may be destroyed, and
// nobody tells the pool when one is. So a stream is touched only
//   - while its user passes it to the pool, which says that it is alive;
//   - if it never dies: the legacy default stream, the calling thread's default stream, and streams
//     that were kept (keep_stream), as torch's pool of streams are.
// Of every other, *foreign*, stream completion is learnt from the whole device.
//
// Values only; the functions are thread-safe.
#pragma once

#include <compare>
#include <cstdint>

#include "driver/types.hpp"

namespace spillover {

struct StreamKey {
  StreamHandle handle = nullptr;
  // The driver's number of the stream; the thread's for the per-thread default stream; 0 for the
  // legacy default stream, kept streams, and where the driver does not number streams.
  uint64_t identity = 0;

  auto operator<=>(const StreamKey&) const = default;
};

// A stream of whichever device: a block may be used by another device than its own.
struct DeviceStream {
  int device = 0;
  StreamKey key;

  auto operator<=>(const DeviceStream&) const = default;
};

// Names a stream that is alive. Asks the driver about foreign ones. Throws DriverError for a handle
// that is not a stream.
StreamKey identify_stream(int device, StreamHandle stream);

// The device of a stream that is alive; of a default stream, which every device has, the given one.
int device_of_stream(int device, StreamHandle stream);

// The caller promises that the stream lives as long as the process.
void keep_stream(int device, StreamHandle stream);

// Whether the stream never dies and every thread may ask the driver about it at any time.
bool is_immortal(int device, const StreamKey& key);

// Whether this thread may ask the driver about the stream at any time.
bool may_be_asked(int device, const StreamKey& key);

// Throws StateError for a stream, alive, that records a graph: it is served by private arenas only.
void check_not_capturing(int device, StreamHandle stream);

}  // namespace spillover
