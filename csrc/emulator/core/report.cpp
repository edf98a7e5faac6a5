#include "emulator/core/report.hpp"

#include <cstdarg>
#include <cstdio>
#include <utility>

namespace spillover::emulator {
namespace {

// A plain pointer, so that a thread may report while it ends.
thread_local std::string* kept_reports = nullptr;

}  // namespace

ReportScope::ReportScope() : is_outermost_(kept_reports == nullptr) {
  if (is_outermost_) kept_reports = &text_;
}

void ReportScope::write() {
  const std::string text = std::exchange(text_, std::string());
  if (!text.empty()) std::fputs(text.c_str(), stderr);
}

void ReportScope::flush() {
  if (!is_outermost_) return;
  kept_reports = nullptr;
  write();
}

void report(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  va_list again;
  va_copy(again, arguments);
  const int length = std::vsnprintf(nullptr, 0, format, arguments);
  va_end(arguments);
  std::string message(static_cast<std::size_t>(length < 0 ? 0 : length), '\0');
  std::vsnprintf(message.data(), message.size() + 1, format, again);
  va_end(again);
  const std::string text = "spillover emulator: " + message + "\n";
  if (kept_reports != nullptr) {
    *kept_reports += text;
  } else {
    std::fputs(text.c_str(), stderr);
  }
}

}  // namespace spillover::emulator
