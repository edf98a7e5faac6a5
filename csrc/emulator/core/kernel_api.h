/* C interface through which kernels get a body on the host. Exported by the emulator's
 * libcuda.so.1, and absent from a real one. Any thread may call.
 */
#ifndef SPILLOVER_EMULATOR_KERNEL_API_H
#define SPILLOVER_EMULATOR_KERNEL_API_H

#include <stddef.h>

#include "emulator/core/c_api.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct spillover_emulator_launch_shape {
  unsigned grid[3];
  unsigned block[3];
  unsigned shared_bytes;
} spillover_emulator_launch_shape;

/* Runs a whole grid. parameters[i] points to a copy of the launch's i-th argument. Device pointers
 * among the arguments must be translated (spillover_emulator_host_pointer). Must not call CUDA. */
typedef void (*spillover_emulator_kernel_body)(void** parameters,
                                               const spillover_emulator_launch_shape* shape,
                                               void* user);

/* Gives the kernel with this (mangled) name a body. parameter_bytes has the size of each of its
 * parameters. Returns 0, or a CUresult. */
int spillover_emulator_register_kernel(const char* name, spillover_emulator_kernel_body body,
                                       void* user, const size_t* parameter_bytes,
                                       size_t parameter_count);

/* Says what a launch touches: writes the ranges of bytes, as device pointers, to ranges and returns
 * how many there are, of which at most capacity are written. Called at the launch, with a lock of
 * the emulated device held: must call nothing of it, nor CUDA. */
typedef size_t (*spillover_emulator_kernel_accesses)(void** parameters,
                                                     const spillover_emulator_launch_shape* shape,
                                                     void* user, spillover_emulator_range* ranges,
                                                     size_t capacity);

/* Lets the checker see what a registered kernel touches. Without it a launch orders its stream, and
 * its accesses are nobody's. Returns 0, or a CUresult. */
int spillover_emulator_declare_accesses(const char* name,
                                        spillover_emulator_kernel_accesses accesses, void* user);

#ifdef __cplusplus
}
#endif
#endif
