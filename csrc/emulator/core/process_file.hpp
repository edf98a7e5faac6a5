// A file of one process that another one opens: what interprocess handles name.
//
// Note [Files between processes]: memory and marks of events that processes share are files in
// memory. A handle names one by its process and descriptor, and the importer opens
// /proc/<process>/fd/<descriptor>. Nothing is ever left behind, whichever process dies first: there
// is no name in a file system. Both processes must see each other's numbers (one container) and
// belong to one user.
//
// Plain functions that any thread may call.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>

namespace spillover::emulator {

struct ProcessFile {
  std::int32_t process = 0;
  std::int32_t descriptor = -1;
  // Descriptors and process numbers are used again; a file's identity is not.
  std::uint64_t inode = 0;
  std::uint64_t file_system = 0;

  bool operator==(const ProcessFile&) const = default;
};

// A file of zeros in memory, -1 where there can be none.
int open_memory_file(const char* name, std::size_t size_bytes);

// Names a file of this process.
ProcessFile describe_file(int file);

// Opens it from another process; -1 where it or its process is gone.
int open_process_file(const ProcessFile& place);

// False once it has ended, also where its parent has not asked for its status yet.
bool process_runs(pid_t process);

}  // namespace spillover::emulator
