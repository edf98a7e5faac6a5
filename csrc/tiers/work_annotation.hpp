// Tells the emulated device's virtual clock of work that it cannot see: disk transfers and the
// CPU's optimizer step. On a real driver the functions are absent and an annotation costs one
// relaxed load; while the clock is off it costs a call.
//
// Thread-safe. Nothing here throws.
#pragma once

#include <cstddef>
#include <cstdint>

namespace spillover {

// Names of the clock's resources.
inline constexpr const char* kCpuOptimizer = "cpu-optimizer";
inline constexpr const char* kDiskRead = "disk-read";
inline constexpr const char* kDiskWrite = "disk-write";

// A number of a piece of work; 0 where nobody keeps time.
using WorkId = uint64_t;

// Around work that the calling thread does itself. PyTorch's CPU operators in between, of which the
// clock knows too, count as a part of it.
WorkId annotate_work_begin(const char* resource, size_t size_bytes) noexcept;
void annotate_work_end(WorkId work) noexcept;

// The same for the time that it lives.
class AnnotatedWork {
 public:
  AnnotatedWork(const char* resource, size_t size_bytes) noexcept
      : work_(annotate_work_begin(resource, size_bytes)) {}
  ~AnnotatedWork() { annotate_work_end(work_); }
  AnnotatedWork(const AnnotatedWork&) = delete;
  AnnotatedWork& operator=(const AnnotatedWork&) = delete;

 private:
  const WorkId work_;
};

// Work that the calling thread asks for and another one does.
WorkId annotate_work_submit(const char* resource, size_t size_bytes) noexcept;

// What the calling thread waits for of the device from now on, until it begins other work, the work
// waits for in virtual time.
void annotate_work_waits(WorkId work) noexcept;

// The work is really done, on whichever thread.
void annotate_work_done(WorkId work) noexcept;

// The calling thread goes on when the work, which is done, would have been.
void annotate_work_wait(WorkId work) noexcept;

// Whether it would have been by now.
bool annotate_work_is_done(WorkId work) noexcept;

}  // namespace spillover
