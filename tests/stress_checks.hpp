// What the stress programs share. Each is built alone, by tools/run_sanitizers.py.
#pragma once

#include <cstdio>
#include <cstdlib>

// Ends the program, saying what is wrong; without destructors, since other threads are at work.
inline void require(bool is_right, const char* what) {
  if (is_right) return;
  std::fprintf(stderr, "%s\n", what);
  std::_Exit(1);
}
