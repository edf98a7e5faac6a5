// How much host memory this process may take, and which limit says so.
//
// Stateless; any thread may call these. They read a few files, so they cost microseconds: call them
// before large steps, not for every buffer.
#pragma once

#include <cstddef>
#include <string>

namespace spillover {

struct HostMemoryLimit {
  size_t bytes;
  // What sets it, as a part of a sentence: "this machine's memory (MemAvailable)", or "memory.max
  // of the control group /job".
  std::string source;
};

// root stands before /proc and /sys: a test gives a folder of its own.

// What is left now: the least of what the kernel says is available and of what each of the
// process's memory control groups (version 1 or 2) still allows. Page cache that can be dropped
// counts as available. SIZE_MAX if nothing can be read.
HostMemoryLimit available_host_memory(const std::string& root = "");

// What there is at most, used or not: the least of the machine's memory and the groups' limits.
HostMemoryLimit total_host_memory(const std::string& root = "");

}  // namespace spillover
