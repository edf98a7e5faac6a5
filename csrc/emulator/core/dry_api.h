/* C interface of dry runs: for the emulated device's ATen part, which asks what is known and says
 * what an operator wrote, and for Python. Exported by the emulator's libcuda.so.1, absent from a
 * real one. Any thread may call.
 *
 * Pointers are device pointers, what spillover_emulator_host_pointer gives for them, or the host's
 * own.
 */
#ifndef SPILLOVER_EMULATOR_DRY_API_H
#define SPILLOVER_EMULATOR_DRY_API_H

#include <stddef.h>

#include "emulator/core/c_api.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What host code gets where it asks for an unknown value. */
enum {
  SPILLOVER_EMULATOR_UNKNOWN_ERROR = 0,
  SPILLOVER_EMULATOR_UNKNOWN_ZERO = 1,
  SPILLOVER_EMULATOR_UNKNOWN_ONE = 2
};

/* 1 in a dry run; it cannot change while the process lives. */
int spillover_emulator_is_dry(void);
int spillover_emulator_unknown_policy(void);

/* How many times the mean load the busiest of a mixture's experts gets; 0 where no model is stated.
 */
double spillover_emulator_routing(void);

/* The most bytes that an operator's tensors may have for it to run for real. */
size_t spillover_emulator_known_bytes_max(void);

/* 1 where the pointer is a device pointer or lies where the bytes of one do. */
int spillover_emulator_is_device_byte(const void* pointer);

int spillover_emulator_is_known(const void* pointer, size_t size_bytes);
void spillover_emulator_set_known(const void* pointer, size_t size_bytes, int is_known);

/* 1 where the host's memory is pinned or registered. */
int spillover_emulator_is_pinned(const void* pointer, size_t size_bytes);

/* The calling thread is about to read and write host memory outside of torch, without asking for
 * values; what it both reads and writes is given twice. 1 where it must not touch that memory: what
 * it reads is unknown, or what it writes is pinned memory too large to have bytes in a dry run.
 * What it writes is unknown from then on, else known. 0 where this is no dry run. */
int spillover_emulator_host_phantom(const spillover_emulator_range* ranges, size_t count);

/* Runs of host memory that are unknown; 0 lets callers skip the question. */
size_t spillover_emulator_unknown_host_runs(void);

/* The calling thread's Python stack, as a number and in words (c_api.h, set_stacks). */
unsigned spillover_emulator_take_site(void);
size_t spillover_emulator_describe_site(unsigned site, char* out, size_t capacity);

#ifdef __cplusplus
}
#endif
#endif
