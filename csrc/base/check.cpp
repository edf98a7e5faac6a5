#include "base/check.hpp"

#include <cstdio>
#include <cstdlib>

namespace spillover {

void check_failed(const char* condition, const char* file, int line,
                  const char* explanation) noexcept {
  std::fprintf(stderr,
               "spillover: broken invariant: %s\n  %s\n  at %s:%d\n"
               "This is a defect in spillover; stopping before it can corrupt data.\n",
               explanation, condition, file, line);
  std::abort();
}

}  // namespace spillover
