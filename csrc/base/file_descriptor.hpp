// A file descriptor of this process, and copies of those of other processes.
//
// Move-only. Thread-safe as a whole number is: one owner at a time.
#pragma once

#include <utility>

namespace spillover {

class FileDescriptor {
 public:
  FileDescriptor() = default;
  explicit FileDescriptor(int number) : number_(number) {}
  ~FileDescriptor() { reset(); }
  FileDescriptor(FileDescriptor&& other) noexcept : number_(std::exchange(other.number_, -1)) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept {
    std::swap(number_, other.number_);
    return *this;
  }
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;

  int number() const { return number_; }  // -1: none
  bool is_open() const { return number_ >= 0; }
  void reset() noexcept;

 private:
  int number_ = -1;
};

// Copies descriptors of one process, which may be this one. Both must see the same process numbers
// (one container), and this one must be allowed to trace the other.
class ProcessFiles {
 public:
  // Throws StateError where the process has ended or the kernel has no such call.
  explicit ProcessFiles(int process);

  // Throws StateError where the process has no such descriptor or does not let us have it.
  FileDescriptor copy(int number) const;

 private:
  int process_;
  FileDescriptor handle_;  // Of the process; none where it is this one.
};

}  // namespace spillover
