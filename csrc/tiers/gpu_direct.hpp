// Whether GPUDirect Storage, which moves bytes between a disk and a device past the host's memory,
// works here.
//
// Note [GPUDirect]. The disk tier does not move data this way. What it promises is that every read
// is checked, and a checksum needs the bytes: computed on the host they would have to cross the bus
// to it after all, which costs more than going through the host does now. That takes a kernel that
// computes CRC-32C on the device. Until there is one, the answer here is for `spillover doctor`,
// and it is found by moving a block both ways and comparing, since everything less (a library, a
// kernel module, a call that returns success) also looks well where cuFile only stands in for
// itself with plain reads and copies. That compatibility mode is forbidden for the probe: it is
// slower than what we have.
#pragma once

#include <string>

namespace spillover {

struct GpuDirectAnswer {
  bool works = false;
  int library_version = 0;  // 1000 * major + 10 * minor; 0 where there is none.
  std::string reason;       // Why it does not work; empty where it does.
};

// Opens library, a name for dlopen(), which stays loaded, and its driver; makes a scratch file in
// the folder and moves a megabyte each way. Blocks. The calling thread needs no context. Does not
// throw: whatever goes wrong is the reason. A library in the mode that a program can no longer
// change, because somebody has opened its driver, counts as not working where that allows
// compatibility.
GpuDirectAnswer probe_gpu_direct(const std::string& library, const std::string& folder, int device);

}  // namespace spillover
