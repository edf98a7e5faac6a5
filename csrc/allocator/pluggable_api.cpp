// The pool in the form of torch's CUDAPluggableAllocator, for machines without a C++ compiler.
//
// Exported by libspillover.so; torch calls these functions from any thread. Unlike the C interface
// they throw: torch takes a NULL for success and would make a tensor at address 0, while an
// exception reaches Python as a RuntimeError with its text.
#include <cstddef>
#include <stdexcept>
#include <string>

#include "allocator/c_api.h"

namespace {

// A failure of the pool, with the pool's reason.
[[noreturn]] void fail(const std::string& operation) {
  throw std::runtime_error("spillover: " + operation + ": " + spillover_last_error());
}

[[noreturn]] void fail_to_allocate(std::size_t size_bytes, int device, spillover_status status) {
  const std::string request =
      "allocating " + std::to_string(size_bytes) + " bytes on device " + std::to_string(device);
  fail(status == SPILLOVER_OUT_OF_MEMORY ? "CUDA out of memory while " + request : request);
}

void require(spillover_status status, const char* operation) {
  if (status != SPILLOVER_OK) fail(operation);
}

}  // namespace

extern "C" {

// Memory for size_bytes on the device, ready for use on stream; NULL for a size of 0 only.
void* spillover_pluggable_alloc(std::size_t size_bytes, int device, void* stream) {
  void* pointer = nullptr;
  const spillover_status status = spillover_alloc(device, size_bytes, stream, &pointer);
  if (status != SPILLOVER_OK) fail_to_allocate(size_bytes, device, status);
  return pointer;
}

// The pool knows a block's size, device and stream from its address.
void spillover_pluggable_free(void* pointer, std::size_t /*size_bytes*/, int /*device*/,
                              void* /*stream*/) {
  require(spillover_free(pointer), "freeing device memory");
}

void spillover_pluggable_record_stream(void* pointer, void* stream) {
  require(spillover_record_stream(pointer, stream), "record_stream");
}

// torch.cuda.empty_cache() names no device: devices are trimmed until there is none of that number.
void spillover_pluggable_empty_cache() {
  spillover_status status = SPILLOVER_OK;
  for (int device = 0; status == SPILLOVER_OK; ++device) status = spillover_trim(device, 0);
  if (status != SPILLOVER_INVALID_ARGUMENT) fail("emptying the cache");
}

void* spillover_pluggable_base(void* pointer, std::size_t* size_bytes) {
  void* base = nullptr;
  require(spillover_base(pointer, &base, size_bytes), "looking up a block's segment");
  return base;
}

void spillover_pluggable_set_memory_fraction(double fraction, int device) {
  require(spillover_set_memory_fraction(device, fraction), "setting the memory fraction");
}
}
