// Holds off whoever writes to a range of the shadow while its bytes move to other pages.
//
// Note [Moving under writers]: operators write to the shadow from threads of the program's own, and
// nobody knows when they do. To move the bytes of an allocation, the range is made read-only; a
// thread that writes to it gets SIGSEGV, whose handler waits until the move is over and lets the
// write happen again, on the new pages. Readers never notice. The handler is in place for the
// duration of a move only, so that a program's own (faulthandler, a crash reporter) stays in
// charge.
//
// One at a time: guarded by Machine::mutex.
#pragma once

#include <signal.h>

#include <cstddef>

#include "emulator/core/types.hpp"

namespace spillover::emulator {

class WriterPause {
 public:
  // The caller makes the range read-only after this and writable before the end.
  WriterPause(Address address, std::size_t size_bytes);
  ~WriterPause();
  WriterPause(const WriterPause&) = delete;
  WriterPause& operator=(const WriterPause&) = delete;

 private:
  struct sigaction previous_{};
};

}  // namespace spillover::emulator
