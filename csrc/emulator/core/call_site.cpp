#include "emulator/core/call_site.hpp"

#include <atomic>

namespace spillover::emulator {
namespace {

std::atomic<CaptureFunction> capture_function = nullptr;
std::atomic<FormatFunction> format_function = nullptr;

thread_local const char* call_name = nullptr;
thread_local SiteId call_site = 0;

}  // namespace

void set_stack_functions(CaptureFunction capture, FormatFunction format) {
  format_function.store(format, std::memory_order_release);
  capture_function.store(capture, std::memory_order_release);
}

SiteId take_site() {
  const CaptureFunction capture = capture_function.load(std::memory_order_acquire);
  return capture == nullptr ? 0 : capture();
}

CallScope::CallScope(const char* name) : is_outermost_(call_name == nullptr) {
  if (!is_outermost_) return;
  call_name = name;
  call_site = take_site();
}

CallScope::CallScope(const char* name, SiteId site) : is_outermost_(call_name == nullptr) {
  if (!is_outermost_) return;
  call_name = name;
  call_site = site;
}

CallScope::~CallScope() {
  if (!is_outermost_) return;
  call_name = nullptr;
  call_site = 0;
}

SiteId current_site() {
  return call_site;
}

const char* current_call() {
  return call_name == nullptr ? "" : call_name;
}

std::string describe_site(SiteId site, const char* indent) {
  const FormatFunction format = format_function.load(std::memory_order_acquire);
  if (site == 0 || format == nullptr) return "";
  std::string text(format(site, nullptr, 0), '\0');
  format(site, text.data(), text.size() + 1);
  std::string lines;
  std::size_t begin = 0;
  while (begin < text.size()) {
    const std::size_t end = text.find('\n', begin);
    lines += "\n" + std::string(indent) + text.substr(begin, end - begin);
    begin = end == std::string::npos ? text.size() : end + 1;
  }
  return lines;
}

}  // namespace spillover::emulator
