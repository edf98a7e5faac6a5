// Where in the program a driver call was made: the calling thread's Python stack, as a number.
//
// The core knows nothing of Python. Whoever does registers two functions (c_api.h,
// spillover_emulator_set_stacks); without them every site is 0, "unknown".
//
// Any thread may call. A site is taken before Machine::mutex is locked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace spillover::emulator {

using SiteId = std::uint32_t;  // 0: unknown

using CaptureFunction = std::uint32_t (*)();
using FormatFunction = std::size_t (*)(std::uint32_t site, char* out, std::size_t capacity);

void set_stack_functions(CaptureFunction capture, FormatFunction format);

// The driver call, or call of the C interface, that the calling thread is in. In nested ones the
// outermost counts.
class CallScope {
 public:
  explicit CallScope(const char* name);
  CallScope(const char* name, SiteId site);  // where the site is known already
  ~CallScope();
  CallScope(const CallScope&) = delete;
  CallScope& operator=(const CallScope&) = delete;

 private:
  const bool is_outermost_;
};

SiteId take_site();

// Of the call that this thread is in; 0 and "" outside of one.
SiteId current_site();
const char* current_call();

// The stack, innermost frame last, one frame a line, each line after the indent; "" for an unknown
// one.
std::string describe_site(SiteId site, const char* indent);

}  // namespace spillover::emulator
