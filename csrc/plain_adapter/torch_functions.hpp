// What the adapter calls of torch, without torch's headers: its OutOfMemoryError and its profiler.
//
// Note [torch's functions]. The plain adapter is for machines without a compiler. What it calls is
// exported by torch's libraries, and Python looks it up by name (allocator/_plain.py).
//   - torch.OutOfMemoryError is made of one C++ class only, c10::OutOfMemoryError. It needs the
//     constructor of its base, c10::Error(SourceLocation, std::string), which sets every member,
//     and the table of virtual functions and the type of the class itself, which adds no member.
//     (torch 2.14 exports the constructor of the class, 2.11 does not.)
//   - The profiler is told of memory by three functions of c10.
// All follow the C++ ABI that torch promises to its extensions. What is missing is done without:
// the error is a std::runtime_error then, as for other failures.
//
// Any thread may call the functions below, with or without the GIL.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace spillover::plain_adapter {

// Addresses, NULL where torch has not the symbol.
struct TorchFunctions {
  void* error_constructor;  // of c10::Error
  void* error_table;        // of c10::OutOfMemoryError, and its type
  void* error_type;
  void* is_profiling;          // c10::memoryProfilingEnabled
  void* report_memory;         // c10::reportMemoryUsageToProfiler
  void* report_out_of_memory;  // c10::reportOutOfMemoryToProfiler
};

// Called once, before torch uses the allocator.
void set_torch_functions(const TorchFunctions& functions) noexcept;

// Throws c10::OutOfMemoryError, or std::runtime_error.
[[noreturn]] void throw_torch_out_of_memory(const std::string& message);

// Whether the calling thread's memory is profiled; it costs little.
bool is_profiling() noexcept;
// change_bytes is negative for a block that is freed; what the pool holds is what it is afterwards.
void report_memory(void* pointer, int64_t change_bytes, size_t allocated_bytes,
                   size_t reserved_bytes, int device);
void report_out_of_memory(size_t requested_bytes, size_t allocated_bytes, size_t reserved_bytes,
                          int device);

}  // namespace spillover::plain_adapter
