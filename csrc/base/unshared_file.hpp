// A file descriptor that a forked child does not get: what is tied to the open file, such as its
// lock, ends with this process, whatever becomes of its children.
//
// Move-only. Thread-safe as a whole number is: one owner at a time. In a forked child it may be
// dropped, which does nothing there. Not seen are children that are made past fork(), by a system
// call of one's own.
#pragma once

#include <cstdint>
#include <functional>
#include <utility>

namespace spillover {

class UnsharedFile {
 public:
  UnsharedFile() = default;
  // open() gives a descriptor, or one below zero, with errno set, which is kept so. No fork happens
  // meanwhile: whoever forks waits for it. It must not make an UnsharedFile itself.
  explicit UnsharedFile(const std::function<int()>& open);
  ~UnsharedFile() { reset(); }
  UnsharedFile(UnsharedFile&& other) noexcept
      : number_(std::exchange(other.number_, -1)), generation_(other.generation_) {}
  UnsharedFile& operator=(UnsharedFile&& other) noexcept {
    std::swap(number_, other.number_);
    std::swap(generation_, other.generation_);
    return *this;
  }
  UnsharedFile(const UnsharedFile&) = delete;
  UnsharedFile& operator=(const UnsharedFile&) = delete;

  int number() const { return number_; }  // -1: none
  bool is_open() const { return number_ >= 0; }
  void reset() noexcept;

 private:
  int number_ = -1;
  uint32_t generation_ = 0;  // fork_generation() of the process that has it.
};

}  // namespace spillover
