// What can be queued on a stream. An operation is moved into its stream's queue when it is enqueued
// and out of it when its turn comes; the scheduler runs it (scheduler.hpp).
//
// Note [Checked when it runs]: copies and memsets name device addresses. They were valid when the
// call was made; when their turn comes they are looked up again, since a program may have unmapped
// or freed the memory in between. That is a sticky error of the device then, as on a GPU, and not a
// crash.
#pragma once

#include <cuda.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <variant>
#include <vector>

#include "emulator/core/types.hpp"
#include "emulator/core/vector_clock.hpp"

namespace spillover::emulator {

class SharedMark;
struct Stream;
using StreamRef = std::shared_ptr<Stream>;
using TimePoint = std::chrono::steady_clock::time_point;

// Rows of bytes; a plain copy is one row. Addresses are as the program gave them.
struct Copy {
  Address destination = 0;
  std::size_t destination_pitch = 0;
  Address source = 0;
  std::size_t source_pitch = 0;
  std::size_t width_bytes = 0;
  std::size_t height = 1;
  std::unique_ptr<std::byte[]> staged;  // the source's rows, packed, when it was pageable
  bool is_source_dropped = false;       // in a dry run: they are data that nobody will ask for

  std::size_t destination_bytes() const { return destination_pitch * (height - 1) + width_bytes; }
  std::size_t source_bytes() const { return source_pitch * (height - 1) + width_bytes; }
};

struct Fill {
  Address destination = 0;
  std::size_t pitch = 0;
  std::size_t width_elements = 0;
  std::size_t height = 1;
  std::uint32_t value = 0;
  unsigned element_bytes = 1;  // 1, 2 or 4

  std::size_t width_bytes() const { return width_elements * element_bytes; }
  std::size_t destination_bytes() const { return pitch * (height - 1) + width_bytes(); }
};

// Bytes that a kernel touches, where that was declared; looked up again before it runs.
struct KernelAccess {
  Address address = 0;
  std::size_t size_bytes = 0;
  bool is_write = false;
};

// Runs on the stream as a kernel would. body takes ownership of what argument points to.
struct Kernel {
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  std::vector<KernelAccess> accesses{};

  // Frees the argument of a kernel that does not run; nullptr where every one does.
  void (*drop)(void*) = nullptr;
};

// What an operation occupies on the virtual clock (clock/timeline.hpp).
enum class Resource : std::uint8_t {
  kNone,
  kCompute,
  kCopyIn,
  kCopyOut,
  kPeerLink,
  kHostFunction,
  kOptimizer,
  kHostOperator,
  kDiskRead,
  kDiskWrite,
};

// What most of a kernel's duration comes from: its fixed part, memory bandwidth, or arithmetic.
enum class KernelLimit : std::uint8_t { kFixed, kMemory, kMath };

struct OperationCost {
  Resource resource = Resource::kNone;
  KernelLimit limit = KernelLimit::kFixed;
  std::int64_t duration = 0;       // nanoseconds where nothing else runs
  std::uint64_t device_bytes = 0;  // moved in the device's memory meanwhile
  std::uint64_t link_bytes = 0;
  std::uint64_t host_bytes = 0;
  const char* name = nullptr;  // on the clock; null: the operation's own
  bool shares_launch = false;  // it was launched along with another node of its graph
};

// A kernel that runs as often as graphs that hold it are launched. run returns a CUresult, and says
// in `error` what went wrong.
struct KernelBody {
  int (*run)(void* argument, char* error, std::size_t capacity) = nullptr;
  void* argument = nullptr;
  void (*release)(void* argument) = nullptr;
  std::vector<KernelAccess> accesses{};
  OperationCost cost{};

  KernelBody() = default;
  KernelBody(KernelBody&& other) noexcept
      : run(other.run),
        argument(other.argument),
        release(std::exchange(other.release, nullptr)),
        accesses(std::move(other.accesses)),
        cost(other.cost) {}
  KernelBody(const KernelBody&) = delete;
  KernelBody& operator=(const KernelBody&) = delete;
  ~KernelBody() {
    if (release != nullptr) release(argument);
  }
};

struct SharedKernel {
  std::shared_ptr<const KernelBody> body;
};

// A callback into the program: may block, may take locks of the program's own.
struct HostFunction {
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  VectorClock clock{};  // what is done when it runs, for the checker
};

// Holds the stream until another one has completed a ticket. Only ever names work that was enqueued
// earlier, so waits cannot form a cycle.
struct WaitForTicket {
  StreamRef stream;
  Ticket ticket = 0;
};

struct RecordTime {
  std::shared_ptr<TimePoint> time;
  std::shared_ptr<std::int64_t> virtual_time;  // null while the clock is off
};

struct WriteValue {
  Address address = 0;
  std::uint64_t value = 0;
  unsigned size_bytes = 4;
};

// Holds the stream until memory satisfies a comparison (CU_STREAM_WAIT_VALUE_*), or until a record
// of an interprocess event is complete, which other processes say in shared memory.
struct WaitValue {
  Address address = 0;
  std::uint64_t value = 0;
  unsigned size_bytes = 4;
  unsigned flags = 0;
  std::shared_ptr<const SharedMark> mark{};  // then value is the number of a record
};

// Tells other processes that a record of an interprocess event is complete.
struct PublishRecord {
  std::shared_ptr<SharedMark> mark;
  std::uint64_t record = 0;
};

// Stream-ordered free of an allocation.
struct FreeMemory {
  Address address = 0;
};

// Holds the stream until it is released: a kernel that hangs (see Scheduler::add_hold).
struct Hold {
  std::uint64_t id = 0;
};

struct Operation {
  std::variant<Copy, Fill, Kernel, SharedKernel, HostFunction, WaitForTicket, RecordTime,
               WriteValue, WaitValue, FreeMemory, Hold, PublishRecord>
      body;
  const char* name = "";
  OperationCost cost;

  bool is_host_function() const { return std::holds_alternative<HostFunction>(body); }

  // Others wait for it by means that the scheduler does not see, so it must run unasked.
  bool is_awaited_elsewhere() const {
    return is_host_function() || std::holds_alternative<PublishRecord>(body);
  }
};

}  // namespace spillover::emulator
