#include "emulator/core/process_file.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>

#include "emulator/core/report.hpp"

namespace spillover::emulator {

int open_memory_file(const char* name, std::size_t size_bytes) {
  const int file = memfd_create(name, MFD_CLOEXEC);
  if (file < 0) {
    report("memfd_create failed: %s", std::strerror(errno));
    return -1;
  }
  if (ftruncate(file, static_cast<off_t>(size_bytes)) == 0) return file;
  close(file);
  return -1;
}

ProcessFile describe_file(int file) {
  struct stat status{};
  if (fstat(file, &status) != 0) return {};
  return {getpid(), file, status.st_ino, status.st_dev};
}

int open_process_file(const ProcessFile& place) {
  char path[64];
  std::snprintf(path, sizeof path, "/proc/%d/fd/%d", place.process, place.descriptor);
  const int file = open(path, O_RDWR | O_CLOEXEC);
  if (file < 0) return -1;
  struct stat status{};
  if (fstat(file, &status) == 0 && status.st_ino == place.inode &&
      status.st_dev == place.file_system) {
    return file;
  }
  close(file);
  return -1;
}

bool process_runs(pid_t process) {
  char path[64];
  std::snprintf(path, sizeof path, "/proc/%d/stat", process);
  const int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0) return false;
  char text[512];
  const ssize_t length = read(file, text, sizeof text - 1);
  close(file);
  if (length <= 0) return false;
  text[length] = '\0';
  // "number (name) state": a name may have brackets in it. Z: it has ended, and nobody has asked.
  const char* state = std::strrchr(text, ')');
  return state != nullptr && state[1] == ' ' && state[2] != 'Z' && state[2] != 'X';
}

}  // namespace spillover::emulator
