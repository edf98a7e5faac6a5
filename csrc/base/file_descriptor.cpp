#include "base/file_descriptor.hpp"

#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>

#include "base/error.hpp"

namespace spillover {
namespace {

// libc of the oldest systems that wheels are for has no functions for these calls, and their
// headers no numbers. Since 5.1 a call has one number on every architecture.
constexpr long kPidfdOpen = 434;
constexpr long kPidfdGetfd = 438;

std::string advice_for(int native_error) {
  switch (native_error) {
    case ESRCH:
      return "the process has ended";
    case EBADF:
      return "it has closed that file: what it shared was freed";
    case ENOSYS:
      return "Linux 5.6 or later is needed";
    case EPERM:
      return "this process may not look into that one: in a container both need the capability "
             "SYS_PTRACE, and where /proc/sys/kernel/yama/ptrace_scope is 1 only a descendant's "
             "memory can be had";
    case EMFILE:
      return "this process has no file descriptors left; raise its limit with `ulimit -n`";
    default:
      return std::strerror(native_error);
  }
}

[[noreturn]] void throw_failure(const char* call, int process, int native_error) {
  throw StateError(std::string(call) + " of process " + std::to_string(process) + " failed: " +
                   advice_for(native_error) + " (errno " + std::to_string(native_error) + ")");
}

}  // namespace

void FileDescriptor::reset() noexcept {
  // Linux gives the descriptor up whatever close() returns.
  if (number_ >= 0) ::close(std::exchange(number_, -1));
}

ProcessFiles::ProcessFiles(int process) : process_(process) {
  if (process == getpid()) return;
  handle_ = FileDescriptor(static_cast<int>(syscall(kPidfdOpen, process, 0)));
  if (!handle_.is_open()) throw_failure("pidfd_open", process, errno);
}

FileDescriptor ProcessFiles::copy(int number) const {
  FileDescriptor file(handle_.is_open()
                          ? static_cast<int>(syscall(kPidfdGetfd, handle_.number(), number, 0))
                          : fcntl(number, F_DUPFD_CLOEXEC, 0));
  if (!file.is_open()) throw_failure("copying a file descriptor", process_, errno);
  return file;
}

}  // namespace spillover
