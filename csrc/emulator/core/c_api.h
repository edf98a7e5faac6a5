/* C interface of the emulated device beside CUDA's own: for its ATen part, for tests and for code
 * that annotates host accesses. Exported by the emulator's libcuda.so.1; absent from a real one, so
 * callers outside the emulator look the names up with dlsym and do nothing where they are missing.
 *
 * Every function may be called from any thread. Streams are CUstream handles as void*.
 * Functions that return int return 0, or a CUresult.
 */
#ifndef SPILLOVER_EMULATOR_C_API_H
#define SPILLOVER_EMULATOR_C_API_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* A contiguous run of bytes that an operation reads or writes. */
typedef struct spillover_emulator_range {
  const void* pointer;
  size_t size_bytes;
  int is_write;
} spillover_emulator_range;

/* The address at which the CPU may touch a device pointer's bytes; any other pointer is returned as
 * is. */
void* spillover_emulator_host_pointer(const void* pointer);

/* Returned where the policy is "raise" and a hazard was found; spillover_emulator_last_hazard has
 * its text. No CUresult is negative. */
#define SPILLOVER_EMULATOR_HAZARD (-1)

/* An operator is about to run on the CPU on behalf of stream: runs everything that the stream's
 * next operation depends on, so that memory holds what a GPU's kernel would see, and tells the
 * checker what the operator, called name, touches. An operator calls again once its outputs are
 * allocated and before it writes to them: they may be memory that other threads left work on
 * meanwhile. Ranges in device or pinned host memory count, others are ignored. Blocks. Returns 0,
 * SPILLOVER_EMULATOR_HAZARD or a CUresult. */
int spillover_emulator_operator_begin(void* stream, const char* name,
                                      const spillover_emulator_range* ranges, size_t range_count);

/* How many stream captures are going on. */
extern int spillover_emulator_captures;

/* From here on copies that are captured are carried out in the capture's memory, for operators. */
void spillover_emulator_follow_captured_values(void);

/* 1 while work on the stream is captured and not run, 2 when that capture is invalid, else 0. */
int spillover_emulator_is_capturing(void* stream);

/* Where an operator that is being captured finds a device pointer's bytes: what they would be if
 * the captured work had run. Bytes to be written are a copy. Valid until the capture ends; NULL
 * where the stream is in none. */
void* spillover_emulator_capture_pointer(void* stream, const void* pointer, size_t size_bytes,
                                         int is_write);

/* Makes a node of the capture that the stream is in. run is called once a launch, on any thread,
 * and must not call CUDA; it returns a CUresult, and a sentence where it failed. release is called
 * when no graph holds the node any more, whatever this function returns. duration_ns,
 * device_bytes and limit are those of spillover_emulator_kernel, for each launch. */
int spillover_emulator_capture_kernel(void* stream, const char* name,
                                      int (*run)(void* argument, char* error, size_t capacity),
                                      void* argument, void (*release)(void* argument),
                                      const spillover_emulator_range* ranges, size_t range_count,
                                      uint64_t duration_ns, uint64_t device_bytes, int limit);

/* Tells the checker what the host itself (a CPU operator, a disk engine) touches of pinned memory.
 * Returns 0 or SPILLOVER_EMULATOR_HAZARD. */
int spillover_emulator_host_access(const char* name, const spillover_emulator_range* ranges,
                                   size_t range_count);

/* The calling thread has a clock of its own from begin to end: it knows of streams only what it
 * waited for, and what other threads release to it. Threads that never call these know all that any
 * thread knows. */
void spillover_emulator_thread_begin(void);
void spillover_emulator_thread_end(void);

/* What the calling thread knows of the streams is handed to whoever acquires the same token later:
 * the identity of a lock, a queue, a message. forget frees what a token holds. */
void spillover_emulator_release(uint64_t token);
void spillover_emulator_acquire(uint64_t token);
void spillover_emulator_forget(uint64_t token);

/* A caching allocator gave a block to the program, or took it back. Never called while a lock of
 * the emulated device is held. pool: 0 for what everybody shares, otherwise a number of the
 * allocator's own pool, whose memory may be kept for graphs. */
void spillover_emulator_block_begin(const void* pointer, size_t size_bytes, uint64_t pool);
void spillover_emulator_block_end(const void* pointer, size_t size_bytes);

/* Whether blocks are followed: set once the program's main allocator tells of its own. Other
 * allocators tell of theirs only then, since half of the truth is worse than nothing. */
void spillover_emulator_follow_blocks(void);
int spillover_emulator_follows_blocks(void);

/* Where calls come from: capture names the calling thread's stack by a number (0: none) and format
 * puts it into words, one line a frame. Neither may call CUDA; format may be called with a lock of
 * the emulated device held. */
void spillover_emulator_set_stacks(uint32_t (*capture)(void),
                                   size_t (*format)(uint32_t site, char* out, size_t capacity));

/* What an address is to the operator that the calling thread runs, for reports; NULL for none. */
void spillover_emulator_set_operand_describer(size_t (*describer)(const void* address,
                                                                  size_t size_bytes, void* context,
                                                                  char* out, size_t capacity),
                                              void* context);

/* What the program holds now, one text each, with where it was made; read like hazard_text. */
size_t spillover_emulator_leak_text(size_t index, char* out, size_t capacity);

/* Live pinned regions (allocated and registered); 0 lets callers skip host accesses. */
size_t spillover_emulator_pinned_count(void);

/* 1 when the checker is on. */
int spillover_emulator_hazards_enabled(void);

/* Hazards found so far, and the text of one ("" and length 0 past the end). The text is copied to
 * out, cut to capacity and terminated; the return value is its full length. */
size_t spillover_emulator_hazard_count(void);
size_t spillover_emulator_hazard_text(size_t index, char* out, size_t capacity);
void spillover_emulator_hazards_clear(void);

/* Text of the hazard that made this thread's last call fail: never NULL. */
const char* spillover_emulator_last_hazard(void);

/* Puts body(argument) on the stream as a kernel called name; it runs when the schedule says so and
 * must not call CUDA. */
int spillover_emulator_launch(void* stream, const char* name, void (*body)(void*), void* argument);

/* Device memory that a program still holds (allocations, mappings, physical handles) and pinned
 * memory; bytes. Any pointer may be NULL. */
void spillover_emulator_live(size_t* device_bytes, size_t* device_allocations, size_t* pinned_bytes,
                             size_t* pinned_regions, size_t* streams, size_t* events);

/* Highest number of bytes ever held on a device, from the driver's point of view. */
size_t spillover_emulator_peak_bytes(int device);

/* The environment variables that configure the device and their values, one "name=value" a line. */
const char* spillover_emulator_config(void);

/* Reads those variables again. 0, and nothing is changed, where a device was used already. */
int spillover_emulator_configure(void);

#ifdef __cplusplus
}
#endif
#endif
