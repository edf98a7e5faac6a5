// The text that torch sends between processes for a CUDA block, and what it says.
//
// Note [IPC handles]: torch pickles the string that shareIpcHandle() returns and gives it to
// getIpcDevPtr() of another process, whose allocator may be another one. So ours has the format of
// torch's own allocator wherever that can say it:
//   version byte, 'c', CUipcMemHandle                              memory at a fixed address;
//   version byte, 'e', header, int32 file descriptors              chunks of one size.
// The header has the process, the size of each chunk and their number, and since version 3 (torch
// 2.13) the kind of descriptors. torch reads no further, so behind them ours has the chunks'
// identities. What torch's format cannot say is
//   version byte, 's', int32 process, uint64 count, chunks         chunks of several sizes,
// which torch's own allocator refuses as an "illformed shareable handle type".
//
// Values and pure functions.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "allocator/c_api.h"

namespace spillover::torch_adapter {

struct IpcHandle {
  int process = 0;
  std::vector<spillover_shared_chunk> chunks;  // none: memory at a fixed address
  std::string fixed;                           // its CUipcMemHandle, or empty
};

std::string encode(const IpcHandle& handle);

// Throws c10::Error that says what is wrong.
IpcHandle decode(const std::string& text);

}  // namespace spillover::torch_adapter
