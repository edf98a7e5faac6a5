/* C interface of trace replay: plays a list of allocations and frees on any allocator that fills in
 * a spillover_replay_target, and measures pairs of both.
 *
 * The player knows nothing of the allocators. The pool's target is here; torch's is made by the
 * part that is compiled against the installed torch (torch_replay). One thread at a time may call.
 */
#ifndef SPILLOVER_REPLAY_C_API_H
#define SPILLOVER_REPLAY_C_API_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* An allocator of one device's memory. Any thread may call its functions, and none of them throws.
 * Those that return int return 0, or another number after which last_error has the sentence, for
 * the calling thread. */
typedef struct spillover_replay_target {
  int (*allocate)(size_t size_bytes, void* stream, void** out);
  int (*free)(void* pointer);
  int (*record_stream)(void* pointer, void* stream);
  size_t (*reserved_bytes)(void); /* held from the driver now */
  const char* (*last_error)(void);
} spillover_replay_target;

enum { SPILLOVER_REPLAY_ALLOC = 0, SPILLOVER_REPLAY_FREE = 1, SPILLOVER_REPLAY_RECORD_STREAM = 2 };

/* Streams, threads and blocks are numbered from 0. A block's number is used once. */
typedef struct spillover_replay_event {
  uint64_t block;
  uint64_t size_bytes; /* of an allocation */
  uint32_t stream;     /* of an allocation or a use */
  uint16_t thread;
  uint16_t kind;
} spillover_replay_event;

typedef struct spillover_replay_job {
  const spillover_replay_event* events;
  size_t event_count;
  size_t block_count;
  void* const* streams; /* CUstream handles by number */
  size_t thread_count;
  uint32_t* latency_ns; /* out, one an event */
  /* Out, one for every sample_every events, taken before them: reserved bytes. */
  uint64_t* reserved_bytes;
  size_t sample_every;
} spillover_replay_job;

/* Plays the events in their order, each on a thread of its own number. Stops at the first that
 * fails, with the target's sentence in error; returns how many events succeeded. Blocks that the
 * trace does not free stay allocated. */
size_t spillover_replay_run(const spillover_replay_target* target, const spillover_replay_job* job,
                            char* error, size_t capacity);

/* Allocates and frees blocks of size_bytes on the default stream, pair_count pairs on each of
 * thread_count threads at the same time. Returns the wall-clock nanoseconds from the first pair's
 * begin to the last one's end; 0 where a call failed. */
uint64_t spillover_replay_pairs(const spillover_replay_target* target, size_t size_bytes,
                                size_t thread_count, size_t pair_count);

/* The device pool of this library (allocator/c_api.h). */
const spillover_replay_target* spillover_replay_pool_target(int device);

#ifdef __cplusplus
}
#endif
#endif
