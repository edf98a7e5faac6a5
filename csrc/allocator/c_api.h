/* C interface of the device pool, for the torch adapter and other users of the pool.
 *
 * Exported by spillover/_lib/libspillover.so. Every function may be called from any thread, never
 * throws and never takes Python's GIL. A function that fails returns a status other than
 * SPILLOVER_OK and leaves its outputs untouched; spillover_last_error() then has the sentence.
 * Streams are CUstream handles as void*: NULL is the legacy default stream.
 */
#ifndef SPILLOVER_ALLOCATOR_C_API_H
#define SPILLOVER_ALLOCATOR_C_API_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Rises with each change of this interface; users ask for the version that they were made with. */
#define SPILLOVER_ABI_VERSION 6

typedef enum spillover_status {
  SPILLOVER_OK = 0,
  SPILLOVER_INVALID_ARGUMENT = 1,
  SPILLOVER_OUT_OF_MEMORY = 2,
  SPILLOVER_DRIVER_FAILURE = 3,
  SPILLOVER_BROKEN_STATE = 4,
  SPILLOVER_BUSY = 5 /* of spillover_try_alloc and spillover_try_free only */
} spillover_status;

/* Counters of one class of blocks. Units: bytes for *_bytes, else numbers. */
typedef struct spillover_counter {
  int64_t current;
  int64_t peak;
  int64_t allocated; /* total ever added */
  int64_t freed;     /* total ever removed */
} spillover_counter;

enum {
  SPILLOVER_CLASS_ALL = 0,
  SPILLOVER_CLASS_SMALL = 1,
  SPILLOVER_CLASS_LARGE = 2,
  SPILLOVER_CLASS_COUNT = 3
};

/* Each array is indexed by SPILLOVER_CLASS_*. */
typedef struct spillover_stats_t {
  spillover_counter allocation[SPILLOVER_CLASS_COUNT]; /* live blocks */
  spillover_counter segment[SPILLOVER_CLASS_COUNT];    /* runs of mapped memory */
  spillover_counter active[SPILLOVER_CLASS_COUNT]; /* live, or freed and still in use by a stream */
  spillover_counter inactive_split[SPILLOVER_CLASS_COUNT];  /* free remainders of split segments */
  spillover_counter allocated_bytes[SPILLOVER_CLASS_COUNT]; /* rounded sizes of live blocks */
  spillover_counter reserved_bytes[SPILLOVER_CLASS_COUNT];  /* held from the driver */
  spillover_counter active_bytes[SPILLOVER_CLASS_COUNT];
  spillover_counter inactive_split_bytes[SPILLOVER_CLASS_COUNT];
  spillover_counter requested_bytes[SPILLOVER_CLASS_COUNT]; /* sizes as asked for */
  int64_t alloc_retries; /* times that the cache was emptied to serve a request */
  int64_t ooms;
} spillover_stats_t;

typedef struct spillover_block_info {
  void* address;
  size_t size_bytes;
  size_t requested_bytes; /* 0 for a free block */
  int state;              /* 0 free, 1 live, 2 freed and waiting for a stream */
} spillover_block_info;

typedef struct spillover_segment_info {
  void* address;
  size_t size_bytes;
  void* stream;
  int is_small;
  int is_fixed; /* the driver's or an upstream's choice of address: does not grow or shrink */
  uint32_t tag;
  int is_asleep;
  size_t block_count;
} spillover_segment_info;

/* What blocks of one tag have on one device, in blocks and bytes. */
typedef struct spillover_tag_stats_t {
  int64_t allocation;      /* live blocks */
  int64_t allocated_bytes; /* their rounded sizes */
  int64_t reserved_bytes;  /* of segments of this tag, without what sleeps */
  int64_t reserved_bytes_peak;
  int64_t asleep_bytes; /* device memory that sleeps; with private arenas made under the tag */
  int64_t saved_bytes;  /* contents that are kept elsewhere meanwhile, likewise */
} spillover_tag_stats_t;

/* Frees memory of the pool, about missing_bytes, and returns how much it has freed; 0 when it has
 * nothing more to give. Called by a thread whose request for stream cannot be served, without locks
 * of the pool, perhaps by several at once. It may call every function of this interface; its own
 * requests do not reclaim. It must not throw. */
typedef size_t (*spillover_reclaimer)(void* user, size_t missing_bytes, void* stream);

/* Where the contents of memory that sleeps are kept; transfer/c_api.h makes one. */
typedef struct spillover_content_store spillover_content_store;

/* Called for each segment, with its blocks in address order. Must not call the pool again. */
typedef void (*spillover_segment_visitor)(void* user, const spillover_segment_info* segment,
                                          const spillover_block_info* blocks);

/* Memory that a device's pool maps at addresses of a segment, or takes away from there. */
typedef struct spillover_segment_change {
  int device;
  int is_mapped; /* 1: it is there from now on; 0: it is about to go, and is there still */
  int is_fixed;  /* as of a segment: it comes and goes as a whole */
  void* address;
  size_t size_bytes;
  void* stream;
  uint32_t tag;
} spillover_segment_change;

/* Called for each change, in order, with the lock of the device's pool held: it must not call the
 * pool, nor wait for a thread that does, nor throw. */
typedef void (*spillover_segment_observer)(const spillover_segment_change* change);

/* A piece of a block's memory that another process can open. */
typedef struct spillover_shared_chunk {
  size_t size_bytes;
  int file; /* a file descriptor of the process that shares it */
  uint64_t
      identity; /* tells it from other memory that had the same number; 0 where it is unknown */
} spillover_shared_chunk;

/* A block of one process for another one: neighbouring chunks, or where there are none the handle,
 * a CUipcMemHandle, of the memory that the block lies in. */
typedef struct spillover_shared_block {
  size_t offset_bytes; /* of the block in that memory */
  int process;
  size_t chunk_count;
  const spillover_shared_chunk* chunks;
  unsigned char handle[64];
} spillover_shared_block;

/* Called once by spillover_share, which copies nothing. */
typedef void (*spillover_shared_visitor)(void* user, const spillover_shared_block* block);

/* What was found when a request could not be served. Units: bytes. */
typedef struct spillover_out_of_memory_t {
  size_t requested_bytes;
  size_t free_bytes;  /* of the device, as the driver says */
  size_t total_bytes; /* of the device */
  size_t limit_bytes; /* of the pool by its settings, SIZE_MAX without one */
  int is_limited;     /* whether that limit stood in the way */
  /* Of the pool: reserved is allocated, waiting for streams, and cached. */
  size_t reserved_bytes;
  size_t allocated_bytes;
  size_t waiting_bytes;
  size_t cached_bytes;
  size_t largest_free_bytes;
  double fragmentation; /* share of what is cached outside the largest free block, 0 to 1 */
  const char* details;  /* sentences: bytes of each tag, what was tried, which setting helps */
  const char* text;     /* all of this in sentences that begin as torch.OutOfMemoryError's do */
} spillover_out_of_memory_t;

int spillover_abi_version(void);

/* The reason of this thread's last failure: never NULL, valid until this thread's next call. */
const char* spillover_last_error(void);

/* More about this thread's last failure, where that was SPILLOVER_OUT_OF_MEMORY for a request's
 * sake; SPILLOVER_INVALID_ARGUMENT, without a new sentence, where it was another. The texts are
 * valid until this thread's next failure. */
spillover_status spillover_last_out_of_memory(spillover_out_of_memory_t* out);

/* Memory of size_bytes on the device's current primary context, ready for use on stream. Aligned to
 * 512 bytes. A size of 0 gives NULL. Fails on a stream that records a graph, whose memory comes
 * from an arena (spillover_alloc_in). */
spillover_status spillover_alloc(int device, size_t size_bytes, void* stream, void** out);

/* As spillover_alloc where a block that this thread has freed fits, and never waits. For those who
 * know that stream records no graph: it is not asked, which would cost more than the rest.
 * SPILLOVER_BUSY: nothing has happened, call spillover_alloc. */
spillover_status spillover_try_alloc(int device, size_t size_bytes, void* stream, void** out);

/* Gives a block back. It may be handed out again on its own stream at once, on others only after
 * the work of every stream noted by spillover_record_stream is complete. NULL is allowed.
 *
 * In a forked child of a process that has used CUDA it does nothing and succeeds: the block is the
 * parent's, and the child lets go of its copies of tensors like of any object. Every other function
 * fails there. */
spillover_status spillover_free(void* pointer);

/* As spillover_free, but never waits for another thread in the pool. SPILLOVER_BUSY: nothing has
 * happened, call spillover_free. */
spillover_status spillover_try_free(void* pointer);

/* Whether this process is such a forked child: 1 or 0. */
int spillover_in_forked_child(void);

/* Notes that the block is used on a stream other than the one it was allocated for. A default
 * stream is that of the block's device; the second function is for those of other devices, too. */
spillover_status spillover_record_stream(void* pointer, void* stream);
spillover_status spillover_record_stream_of(void* pointer, int stream_device, void* stream);

/* Promises that the stream lives as long as the process, as the default streams and torch's own do.
 * Memory that was freed on a kept stream serves other streams as soon as its work is complete; of
 * any other stream the pool cannot know whether it still lives, so that it learns of completion
 * from the whole device, and at need waits for it. */
spillover_status spillover_keep_stream(int device, void* stream);

/* Lets the peer device, which can access the device, use its pool's memory. */
spillover_status spillover_add_peer(int device, int peer);

/* Shows a live block to the visitor as other processes can open it. The block must stay live until
 * each of them has closed it. They see the whole of the chunks that it lies in. */
spillover_status spillover_share(const void* pointer, spillover_shared_visitor visitor, void* user);

/* Opens a block of another process for a device and the peers of its pool, and gives the address of
 * the memory that the block lies at offset_bytes in. Memory that is open already keeps its address;
 * each call wants one of spillover_close_shared with that address, whose last one waits for the
 * device's work. */
spillover_status spillover_open_shared(int device, const spillover_shared_block* block, void** out);
spillover_status spillover_close_shared(void* address);

/* Start and size of the segment that holds pointer. */
spillover_status spillover_base(const void* pointer, void** base, size_t* size_bytes);

/* The number of the tag, or of the private arena, that a live block's memory belongs to: another
 * than was asked for where an arena has lent it. */
spillover_status spillover_tag_of(const void* pointer, uint32_t* out);

/* Device of a live block's address, -1 where it is not ours. */
int spillover_device_of(const void* pointer);

/* This, the two below, trimming, sleep and wake, the largest free block, the segments and the check
 * of invariants make no context on a device that the process has not used: its pool counts as
 * empty. */
spillover_status spillover_stats(int device, spillover_stats_t* out);
spillover_status spillover_reset_accumulated_stats(int device);
spillover_status spillover_reset_peak_stats(int device);

/* Bytes of live blocks and bytes held, and the most bytes of live blocks since the last call for
 * the device. Others' peaks are left as they are. For who plans how much memory it may use: one
 * caller at a time. */
typedef struct {
  int64_t allocated_bytes;
  int64_t reserved_bytes;
  int64_t allocated_bytes_peak;
} spillover_interval;
spillover_status spillover_take_interval(int device, spillover_interval* out);

/* Returns memory without a live block to the driver until the pool holds at most keep_bytes. Waits
 * for the device. */
spillover_status spillover_trim(int device, size_t keep_bytes);

/* Changes settings by a text such as "limit=20GiB,wait_max=30s", all of it or nothing. A device of
 * -1 means every pool, those too that are made later; the pool of a device that has none is made
 * with them. docs/allocator.md has the keys; the environment variable SPILLOVER_ALLOCATOR has the
 * form of the text and is read before the first pool is made. */
spillover_status spillover_configure(int device, const char* settings);

/* Rounds the sizes of every pool's blocks up from now on: between a power of two and the next one
 * they are so many divisions apart, a power of two up to 32768, or 0 for the 512 bytes that sizes
 * are rounded to anyway. The first number is for sizes below 2 MiB, each further one for the next
 * power of two, the last for what is larger. Statistics have both sizes. */
enum { SPILLOVER_ROUNDING_INTERVALS = 16 };
spillover_status spillover_round_sizes(const size_t divisions[SPILLOVER_ROUNDING_INTERVALS]);

/* Whether a block of a private arena that was allocated and freed in one capture may be allocated
 * in that capture again, by its own stream, once this waits there for every stream that was noted
 * by spillover_record_stream. Off at first: each such allocation then looks through the graph. */
spillover_status spillover_reuse_in_capture(int is_on);

/* What the pool may hold by its settings, SIZE_MAX without a limit. */
spillover_status spillover_limit(int device, size_t* out);

/* The number of a tag by its name, the same for every device; "" is 0, the tag of whoever sets
 * none. */
spillover_status spillover_tag(const char* name, uint32_t* out);

/* Tags what the calling thread allocates from now on; previous may be NULL. */
spillover_status spillover_set_tag(uint32_t tag, uint32_t* previous);

spillover_status spillover_tag_stats(int device, uint32_t tag, spillover_tag_stats_t* out);

/* Gives the device memory of tags to the driver, that of private arenas made under them too;
 * spillover_wake brings it back at its addresses. Live blocks are copied to the store, which may be
 * released while they sleep; without one (NULL) what is in them after waking is not defined. Until
 * then a use of the memory faults and a request with the tag fails; freeing is as ever.
 *
 * Waits until the device and its peers have done everything that was submitted, and for the copies.
 * No thread may use or submit work on memory of the tags from the call on. Nothing happens to tags
 * that sleep already. Either all tags sleep afterwards or, after a failure, none:
 * SPILLOVER_OUT_OF_MEMORY where the store has no room, SPILLOVER_INVALID_ARGUMENT for a tag that
 * spillover_tag has not given or a pool without virtual memory, SPILLOVER_BROKEN_STATE while a
 * graph is recorded, a block is shared or another thread does the same to a tag. copied_bytes may
 * be NULL. */
spillover_status spillover_sleep(int device, const uint32_t* tags, size_t tag_count,
                                 spillover_content_store* store, size_t* copied_bytes);

/* Brings the memory of tags back with its contents, for use on any stream. Waits until everything
 * is in place. Nothing happens to tags that are awake. Either all are awake afterwards or, after a
 * failure, all sleep on with their contents, and the call can be repeated: SPILLOVER_OUT_OF_MEMORY
 * where the device has not enough after everything that a request tries. */
spillover_status spillover_wake(int device, const uint32_t* tags, size_t tag_count,
                                size_t* copied_bytes);

/* A private arena of one device: memory for CUDA graphs and others that need their addresses to
 * stay. Until it is released its free memory serves its own requests only, each on its own stream,
 * and is not unmapped. */
spillover_status spillover_make_arena(int device, uint32_t* out);

/* Memory for a private arena from another allocator: device memory of size_bytes, for use on
 * stream; NULL where there is none. The size is a multiple of 2 MiB, or 512 bytes more once an
 * address was no multiple of 512. */
typedef void* (*spillover_upstream_alloc)(void* user, size_t size_bytes, void* stream);
/* Takes such memory back; the work on it is complete. */
typedef void (*spillover_upstream_free)(void* user, void* pointer, size_t size_bytes);

/* As spillover_make_arena with memory from elsewhere, of which nothing serves others and nothing
 * sleeps. The functions must not throw, are called by any thread with whatever device is current
 * there and without locks of the pool, and may call the pool. done, which may be NULL, is called
 * when neither will be called again: after the release, when the last memory has gone back, which
 * spillover_trim and spillover_trim_arena do, and the pool by itself when memory has run out. Where
 * this fails it is not called. */
spillover_status spillover_make_arena_from(int device, spillover_upstream_alloc alloc,
                                           spillover_upstream_free free, void (*done)(void* user),
                                           void* user, uint32_t* out);

/* As spillover_alloc from a private arena in use, also on a stream that records a graph. The block
 * is freed like any other. */
spillover_status spillover_alloc_in(int device, size_t size_bytes, void* stream, uint32_t arena,
                                    void** out);

/* Memory at an address, a multiple of 512, that is free memory of the stream and of the arena, or
 * with an arena of 0 of the thread's tag: what was freed there, say. No other memory is looked for
 * and nothing is waited for: SPILLOVER_BROKEN_STATE where it is not to be had. */
spillover_status spillover_alloc_at(int device, size_t size_bytes, void* stream, uint32_t arena,
                                    void* address, void** out);

/* Says that the stream, which lives, will ask an arena in use for memory. While such a stream, if
 * it is kept, records a graph, nothing waits for the device, which would end the recording. Whoever
 * does not say so is known from the stream's first allocation on. */
spillover_status spillover_expect_stream(int device, uint32_t arena, void* stream);

/* Frees every live block of an arena in use and makes those that are given live again, at their
 * addresses: blocks that spillover_visit_segments has shown as live in it. All of it or nothing. */
spillover_status spillover_restore_arena(int device, uint32_t arena,
                                         const spillover_block_info* blocks, size_t block_count);

/* Ends the use of an arena. Its live blocks stay valid, its free memory becomes ordinary. */
spillover_status spillover_release_arena(int device, uint32_t arena);

/* Returns the idle memory of a released arena to the driver. Waits for the device. */
spillover_status spillover_trim_arena(int device, uint32_t arena);

/* lends: free blocks of the arena serve ordinary requests on their stream that would fail
 * otherwise. is_whole: each block is a segment of its own, with chunks of its own, and is handed
 * out whole where it is larger than what is asked for. Both are 0 at first; is_whole cannot change
 * once memory was asked for. */
spillover_status spillover_set_arena_options(int device, uint32_t arena, int lends, int is_whole);

/* Adds a function that is asked for memory before a request fails, after those added before; out
 * gets a number for spillover_remove_reclaimer, which waits until it does not run any more. */
spillover_status spillover_add_reclaimer(int device, spillover_reclaimer reclaimer, void* user,
                                         uint64_t* out);
spillover_status spillover_remove_reclaimer(int device, uint64_t number);

/* The pool may hold at most fraction (0 to 1) of the device's memory. */
spillover_status spillover_set_memory_fraction(int device, double fraction);
spillover_status spillover_memory_fraction(int device, double* out);

/* Size of the largest free block, bytes; chunks without an address, which any request can have side
 * by side, count as one. */
spillover_status spillover_largest_free(int device, size_t* out);

spillover_status spillover_visit_segments(int device, spillover_segment_visitor visitor,
                                          void* user);

/* Has a function see what is mapped and taken away from now on, of every device, until another one
 * or NULL takes its place; it may still run then. Memory that changes hands from one stream or
 * arena to another is taken away and mapped. */
void spillover_observe_segments(spillover_segment_observer observer);

/* Walks every structure and compares it with its equations; the first that fails is the error. */
spillover_status spillover_check_invariants(int device);

#ifdef __cplusplus
}
#endif
#endif
