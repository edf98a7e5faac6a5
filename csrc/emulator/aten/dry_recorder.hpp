// What is alive at the peak of a dry run, by class, step and line: follows the blocks of torch's
// allocator through its trace tracker. C functions, which Python calls; any thread may call.
//
// Note [Blocks at the peak]. The peak is known only once it is past, and a copy of all live blocks
// at each new maximum would be quadratic. Blocks are numbered; those of the peak are the live ones
// with numbers up to the peak's, and those of such numbers that were freed since, which are kept
// until the next maximum. Hence classes that are learnt later (a gradient is known as one when the
// optimizer steps) still reach blocks of an earlier peak.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

struct spillover_emulator_block {
  uint64_t number;
  uint64_t size_bytes;
  uint32_t site;          // a Python stack (core/dry_api.h)
  uint32_t forward_site;  // where site is 0 and a backward pass allocated: of the forward operator
  uint32_t step;
  int32_t phase;
  int32_t kind;
  const char* operator_name;  // nullptr: allocated by other code than an operator
};

// Starts following; torch's allocator must be set up. 0, or -1 where it offers no trackers.
int spillover_emulator_recorder_start() noexcept;

// What the program does from now on. Backward passes are noticed without it.
void spillover_emulator_recorder_phase(int phase, unsigned step) noexcept;

// Says what the block that the address lies in holds.
void spillover_emulator_recorder_tag(int device, const void* address, int kind) noexcept;

// The present counts as the peak of the device from now on: an allocation of this thread's failed.
// 0 where the program goes on without it.
int spillover_emulator_recorder_freeze(int device) noexcept;

// The blocks of the peak; returns their number and fills at most capacity of them.
size_t spillover_emulator_recorder_peak(int device, spillover_emulator_block* out,
                                        size_t capacity) noexcept;

}  // extern "C"
