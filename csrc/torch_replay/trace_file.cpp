#include "torch_replay/trace_file.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>

namespace spillover::torch_replay {
namespace {

constexpr std::size_t kWaitingBytesMax = std::size_t{1} << 16U;
constexpr int kTraceFileMode = 0644;

}  // namespace

int TraceFile::open(const char* path) {
  const int descriptor = ::open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, kTraceFileMode);
  if (descriptor < 0) return errno;
  descriptor_ = descriptor;
  owner_pid_ = getpid();
  error_ = 0;
  waiting_.clear();
  waiting_.reserve(2 * kWaitingBytesMax);
  return 0;
}

bool TraceFile::is_open() const {
  return descriptor_ >= 0 && owner_pid_ == getpid();
}

void TraceFile::append(std::string_view text) {
  waiting_ += text;
  if (waiting_.size() >= kWaitingBytesMax) flush();
}

int TraceFile::close() {
  if (!is_open()) return 0;
  flush();
  if (::close(descriptor_) != 0 && error_ == 0) error_ = errno;
  descriptor_ = -1;
  return error_;
}

// After an error the rest of the trace is dropped: with a gap in it, it would be wrong.
void TraceFile::flush() {
  std::string_view left = waiting_;
  while (!left.empty() && error_ == 0) {
    const ssize_t written = ::write(descriptor_, left.data(), left.size());
    if (written >= 0) {
      left.remove_prefix(static_cast<std::size_t>(written));
    } else if (errno != EINTR) {
      error_ = errno;
    }
  }
  waiting_.clear();
}

}  // namespace spillover::torch_replay
