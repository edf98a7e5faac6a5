// Copies and memsets: which of them are legal, which block, which are staged, and what the checker
// is told of them.
//
// Note [Pageable memory]: a GPU cannot read it directly. An asynchronous copy from it takes the
// bytes at the call; a copy to it returns when the bytes are there. Memory that is pinned or
// registered is read and written when the copy's turn comes, and must be left alone until then.
//
// Called with Machine::mutex held; the functions let go of it while they wait or stage.
#pragma once

#include <cuda.h>

#include "emulator/core/machine.hpp"
#include "emulator/core/operation.hpp"
#include "emulator/core/types.hpp"

namespace spillover::emulator {

enum class CopyKind { kAny, kHostToDevice, kDeviceToHost, kDeviceToDevice, kPeer };

// Whether the call was the variant with Async in its name. Those without wait as well, but for
// copies and memsets that touch only device memory: CUDA does not make the host wait for these.
enum class CallVariant { kAsync, kSync };

CUresult copy(Machine& machine, Lock& lock, const StreamRef& stream, Copy shape, CopyKind kind,
              CallVariant variant);

// Whether copy() can make this copy of live memory, and what it is called then.
CUresult check_copy(Machine& machine, const Copy& shape, CopyKind kind, const char** name);

CUresult fill(Machine& machine, Lock& lock, const StreamRef& stream, const Fill& shape,
              CallVariant variant);

// Tells the checker what a copy or memset of a graph touches. True when there was a hazard.
bool record_copy(Machine& machine, const Stream& stream, Ticket ticket, const char* name,
                 const Copy& copy);
bool record_fill(Machine& machine, const Stream& stream, Ticket ticket, const char* name,
                 const Fill& fill);

// What it takes on the virtual clock.
OperationCost cost_of(Machine& machine, const Copy& copy);
OperationCost cost_of(Machine& machine, const Fill& fill);

// Makes a node of a graph of it, where it can be one.
CUresult check_copy_node(Machine& machine, const Copy& copy, const char** name);
CUresult check_fill_node(Machine& machine, const Fill& fill);

}  // namespace spillover::emulator
