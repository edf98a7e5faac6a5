/* C interface of the stores that spillover_sleep (allocator/c_api.h) copies device memory to.
 *
 * Exported by spillover/_lib/libspillover.so. Every function may be called from any thread and
 * never throws.
 */
#ifndef SPILLOVER_TRANSFER_C_API_H
#define SPILLOVER_TRANSFER_C_API_H

#include <stddef.h>

#include "allocator/c_api.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A store in pinned host memory of at most limit_bytes, SIZE_MAX for what the machine allows; it
 * takes none before something is copied to it. The device is the one whose context pins; the memory
 * serves all. NULL where there is no memory for the store itself. */
spillover_content_store* spillover_make_host_store(size_t limit_bytes, int device);

/* Gives up a store. What it keeps for memory that sleeps stays until that wakes or is freed. NULL
 * is allowed. */
void spillover_release_store(spillover_content_store* store);

#ifdef __cplusplus
}
#endif
#endif
