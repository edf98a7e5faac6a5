/* C interface of the virtual clock: for the emulator's ATen part, for Python, and for programs that
 * tell it of work that it cannot see. Exported by the emulator's libcuda.so.1; absent from a real
 * one, so callers outside the emulator look the names up with dlsym and do nothing where they are
 * missing. While the clock is off, functions do nothing and return 0.
 *
 * Every function may be called from any thread. Times are nanoseconds since the device's start.
 */
#ifndef SPILLOVER_EMULATOR_CLOCK_API_H
#define SPILLOVER_EMULATOR_CLOCK_API_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* 1 when the clock is on; it cannot change while the process lives. */
int spillover_emulator_clock_enabled(void);

/* A number of the profile, such as "gpu.sm_count"; 0 for a key that is not there. */
double spillover_emulator_profile(const char* key);

/* What most of a kernel's duration comes from: its fixed part, memory bandwidth, or arithmetic. */
typedef enum {
  SPILLOVER_EMULATOR_LIMIT_FIXED = 0,
  SPILLOVER_EMULATOR_LIMIT_MEMORY = 1,
  SPILLOVER_EMULATOR_LIMIT_MATH = 2
} spillover_emulator_limit;

/* The calling thread has just performed a kernel on stream that takes duration_ns on the profile's
 * card, where nothing else runs, and moves device_bytes of its memory. name lives for ever. */
void spillover_emulator_kernel(void* stream, const char* name, uint64_t duration_ns,
                               uint64_t device_bytes, spillover_emulator_limit limit);

/* The calling thread's time; the thread works, or waits for something outside, for so long. */
int64_t spillover_emulator_now(void);
void spillover_emulator_advance(int64_t duration_ns);

/* The calling thread does work on a resource of the host: "cpu-optimizer", "disk-read",
 * "disk-write". A negative duration is computed from the profile. Returns 0, or
 * CUDA_ERROR_INVALID_VALUE for a resource that there is not. */
int spillover_emulator_work(const char* resource, size_t size_bytes, int64_t duration_ns);

/* The calling thread has performed a CPU operator that moves size_bytes of the host's memory; few
 * bytes take no time. Where the thread is between begin and end of work (below), the operator is a
 * part of that. name lives for ever. */
void spillover_emulator_host_operator(const char* name, uint64_t size_bytes, int is_optimizer);

/* The same for work that another thread does later. submit is called by the thread that asks for
 * it and returns its number, or 0. The thread that does it calls begin and end; what it waits for
 * of the device in between, the work waits for in virtual time. wait moves the calling thread to
 * the work's end, which must really have come; is_done says whether that is over at its time. */
uint64_t spillover_emulator_work_submit(const char* resource, size_t size_bytes);
void spillover_emulator_work_begin(uint64_t work);
void spillover_emulator_work_end(uint64_t work);
void spillover_emulator_work_wait(uint64_t work);
int spillover_emulator_work_is_done(uint64_t work);

/* The report as JSON: copied to out, cut to capacity and terminated; the return value is its full
 * length. With out NULL a new one is made, which calls with a buffer then copy. Like
 * cuCtxSynchronize, it waits for everything that was launched. */
size_t spillover_emulator_clock_report(char* out, size_t capacity);

/* Notes the moment at which all that was launched so far is done, and returns its number, from 0
 * on; -1 while the clock is off. The moment itself is known once it has come. */
int64_t spillover_emulator_clock_mark(void);
int64_t spillover_emulator_clock_mark_time(int64_t mark);

/* What the time between two moments went by, along the critical path: JSON, a list of causes as in
 * the report's shares. Their sum is to_ns - from_ns, or less where the record of so long ago was
 * dropped. Used like the report. */
size_t spillover_emulator_clock_limits(int64_t from_ns, int64_t to_ns, char* out, size_t capacity);

/* Writes what is known as a trace in Chrome's format. Returns 0 or an errno. */
int spillover_emulator_clock_trace(const char* path);

/* Turns of the program's threads (clock/host_turns.hpp, Note [Turns]). */
void spillover_emulator_turn_begin(const char* name);
uint32_t spillover_emulator_turn_announce(const char* name);
void spillover_emulator_turn_attach(uint32_t thread);
void spillover_emulator_turn_end(void);
void spillover_emulator_turn_cancel(uint32_t thread);
void spillover_emulator_turn_yield(void);
int spillover_emulator_turn_block(uint64_t token, int64_t timeout_ns);
void spillover_emulator_turn_resume(void);
void spillover_emulator_turn_wake(uint64_t token);
void spillover_emulator_set_interpreter(int (*release)(void** state), void (*restore)(void* state));

#ifdef __cplusplus
}
#endif
#endif
