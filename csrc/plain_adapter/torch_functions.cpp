#include "plain_adapter/torch_functions.hpp"

#include <cxxabi.h>

#include <cstring>
#include <stdexcept>
#include <typeinfo>

namespace spillover::plain_adapter {
namespace {

// As c10::SourceLocation.
struct SourceLocation {
  const char* function;
  const char* file;
  uint32_t line;
};

// As c10::Device.
struct Device {
  int8_t type;
  int8_t index;
};
constexpr int8_t kCudaType = 1;

using Constructor = void (*)(void* self, SourceLocation location, std::string message);
using Destructor = void (*)(void* self);
using IsProfiling = bool (*)();
using ReportMemory = void (*)(void* pointer, int64_t change_bytes, size_t allocated_bytes,
                              size_t reserved_bytes, Device device);
using ReportOutOfMemory = void (*)(int64_t requested_bytes, size_t allocated_bytes,
                                   size_t reserved_bytes, Device device);

// c10::Error has about 130 bytes.
constexpr size_t kErrorBytesMax = 1024;
// A table begins with the offset to the top and the type; objects point behind these, where the
// destructor is the first function.
constexpr size_t kTableStart = 2;

// Constant once torch uses the allocator.
TorchFunctions torch{};

Device cuda_device(int device) noexcept {
  return {kCudaType, static_cast<int8_t>(device)};
}

}  // namespace

void set_torch_functions(const TorchFunctions& functions) noexcept {
  torch = functions;
}

void throw_torch_out_of_memory(const std::string& message) {
  if (torch.error_constructor == nullptr || torch.error_table == nullptr ||
      torch.error_type == nullptr) {
    throw std::runtime_error(message);
  }
  void* error = abi::__cxa_allocate_exception(kErrorBytesMax);
  try {
    reinterpret_cast<Constructor>(torch.error_constructor)(error, {__func__, "spillover", 0},
                                                           message);
  } catch (...) {
    abi::__cxa_free_exception(error);
    throw;
  }
  void* const* functions = static_cast<void* const*>(torch.error_table) + kTableStart;
  std::memcpy(error, &functions, sizeof functions);
  const auto destroy = reinterpret_cast<Destructor>(functions[0]);
  abi::__cxa_throw(error, static_cast<std::type_info*>(torch.error_type), destroy);
}

bool is_profiling() noexcept {
  return torch.is_profiling != nullptr && reinterpret_cast<IsProfiling>(torch.is_profiling)();
}

void report_memory(void* pointer, int64_t change_bytes, size_t allocated_bytes,
                   size_t reserved_bytes, int device) {
  if (torch.report_memory == nullptr) return;
  reinterpret_cast<ReportMemory>(torch.report_memory)(pointer, change_bytes, allocated_bytes,
                                                      reserved_bytes, cuda_device(device));
}

void report_out_of_memory(size_t requested_bytes, size_t allocated_bytes, size_t reserved_bytes,
                          int device) {
  if (torch.report_out_of_memory == nullptr) return;
  reinterpret_cast<ReportOutOfMemory>(torch.report_out_of_memory)(
      static_cast<int64_t>(requested_bytes), allocated_bytes, reserved_bytes, cuda_device(device));
}

}  // namespace spillover::plain_adapter
