// Device memory and events that several processes use: what CUDA's 64-byte handles say, and what
// they do. See process_file.hpp, Note [Files between processes].
//
// Note [Each process has its own device]: processes share bytes and events, nothing else. Each has
// its own budget, streams and checker: imported memory costs the importer nothing, and an access by
// another process is never compared with one of this process.
//
// Called with Machine::mutex held; close_memory lets go of it while it waits.
#pragma once

#include <cuda.h>

#include "emulator/core/machine.hpp"
#include "emulator/core/types.hpp"

namespace spillover::emulator {

// Names the allocation that contains address, which must come from cuMemAlloc.
CUresult export_memory(Machine& machine, Address address, CUipcMemHandle* handle);

// Maps it in this process; context is where it is opened. Opening it again gives the same address.
CUresult open_memory(Machine& machine, Context& context, const CUipcMemHandle& handle,
                     Address* address);

// Takes back one open; the last one waits for the device and unmaps the memory.
CUresult close_memory(Machine& machine, Lock& lock, Address address);

CUresult export_event(const Event& event, CUipcEventHandle* handle);
CUresult open_event(Machine& machine, Context& context, const CUipcEventHandle& handle,
                    CUevent* event);

}  // namespace spillover::emulator
