/* C interface of injected faults: errors at chosen calls of the driver and the runtime, memory that
 * another process takes, streams that are slow or stuck. For spillover.emulator.faults() and for
 * the emulated runtime, whose calls are counted by the same rules.
 *
 * Every function may be called from any thread. Functions that return int return a CUresult.
 */
#ifndef SPILLOVER_EMULATOR_FAULT_API_H
#define SPILLOVER_EMULATOR_FAULT_API_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* When a failing call does its work. */
enum {
  SPILLOVER_EMULATOR_FAULT_DEFAULT = 0, /* after for functions that release or wait, else before */
  SPILLOVER_EMULATOR_FAULT_BEFORE = 1,  /* never: the call has no effect but its error */
  SPILLOVER_EMULATOR_FAULT_AFTER = 2    /* first, and then it returns the error all the same */
};

/* Calls of function are counted from 1 since the plan began. Those from first_call on fail with the
 * given probability, times of them at most. */
typedef struct spillover_emulator_fault {
  const char* function; /* "cuMemAlloc" or "cudaMalloc"; "*" is any function of the driver */
  uint64_t first_call;
  uint64_t times; /* 0: without end */
  double probability;
  int error; /* a CUresult; 0: one that the function is known to return */
  int timing;
} spillover_emulator_fault;

/* 1 while calls are counted and faults injected: all that an ordinary call looks at. */
extern int spillover_emulator_observes_calls;

/* Starts counting calls from zero, with a plan that is copied; ends the plan before. */
void spillover_emulator_plan_begin(const spillover_emulator_fault* faults, size_t count,
                                   uint64_t seed);

/* Ends counting and injecting. The counts stay until the next plan begins. */
void spillover_emulator_plan_end(void);

/* For an entry point named name while calls are observed: counts the call. Returns the error that
 * it shall return at once, or 0; *late is then the error to return in place of success, or 0. */
int spillover_emulator_observe_call(const char* name, int* late);

/* 1 once some device refuses all further work, as it does after a sticky error. A launch or copy
 * that was itself refused, for memory that is gone, returns such an error and breaks nothing. */
int spillover_emulator_device_is_broken(void);

/* One "name count" a line, ascending: every function that was called since the plan began. */
size_t spillover_emulator_call_counts(char* out, size_t capacity);

/* One "name bytes" a line, ascending: the device memory that successful calls were about since the
 * plan began, for the functions that allocate, free, reserve, create, map, unmap, release it or set
 * its access. */
size_t spillover_emulator_call_bytes(char* out, size_t capacity);

/* One "name call error" a line, in the order of injection. */
size_t spillover_emulator_faults_fired(char* out, size_t capacity);

/* The driver's functions, one name a line; the errors that CUDA defines, one "name number" a line.
 * Both are constant. */
size_t spillover_emulator_function_names(char* out, size_t capacity);
size_t spillover_emulator_error_names(char* out, size_t capacity);

/* Bytes of a device that another process holds from now on, and the most bytes that this process
 * may pin (SIZE_MAX: no limit). Both are refused as CUDA refuses: CUDA_ERROR_OUT_OF_MEMORY. */
int spillover_emulator_occupy(int device, size_t size_bytes);
int spillover_emulator_limit_pinned(size_t size_bytes);

/* Every copy, memset and kernel on the stream takes this much longer from now on. */
int spillover_emulator_slow_stream(void* stream, unsigned delay_us);

/* Puts an operation on the stream that does not end until it is released. Queries say
 * CUDA_ERROR_NOT_READY; a call that waits for it gives up after timeout_ms with CUDA_ERROR_TIMEOUT
 * and without an effect. *id names the operation. */
int spillover_emulator_hold_stream(void* stream, unsigned timeout_ms, uint64_t* id);
int spillover_emulator_release_stream(uint64_t id);

#ifdef __cplusplus
}
#endif
#endif
