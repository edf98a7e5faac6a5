// Sentences for the user, on stderr.
//
// Any thread may call.
#pragma once

#include <string>

namespace spillover::emulator {

// Writes "spillover emulator: <message>" and a newline to stderr in one piece; inside a ReportScope
// of this thread, at that scope's end.
void report(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Keeps what the calling thread reports until the scope ends. Whoever locks Machine::mutex opens
// one before, so that nobody waits for a slow terminal or a full pipe. In nested scopes the
// outermost one counts.
class ReportScope {
 public:
  ReportScope();
  ~ReportScope() { flush(); }
  ReportScope(const ReportScope&) = delete;
  ReportScope& operator=(const ReportScope&) = delete;

  bool empty() const { return text_.empty(); }

  // Writes what has been kept so far; for threads that hold the mutex most of their lives.
  void write();

 private:
  void flush();

  const bool is_outermost_;
  std::string text_;
};

}  // namespace spillover::emulator
