// A file that is appended to in large pieces. Not thread-safe; its owner has a mutex.
//
// Not a FILE: a child that is forked while text waits in a FILE's buffer writes it a second time
// when it ends. The file belongs to the process that opened it.
#pragma once

#include <string>
#include <string_view>

namespace spillover::torch_replay {

class TraceFile {
 public:
  TraceFile() = default;
  TraceFile(const TraceFile&) = delete;
  TraceFile& operator=(const TraceFile&) = delete;

  // 0 or an errno. The file must be closed.
  int open(const char* path);
  bool is_open() const;
  void append(std::string_view text);

  // Writes what is left. 0, or the errno of the first write that failed. Nothing in a forked child.
  int close();

 private:
  void flush();

  int descriptor_ = -1;
  int owner_pid_ = 0;
  int error_ = 0;
  std::string waiting_;
};

}  // namespace spillover::torch_replay
