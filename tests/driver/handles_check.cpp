// Uses the driver layer's handles as the layers above do, and checks what each one promises. Built
// and run by test_handles.py against libspillover.so; prints one line a check and fails at the
// first.
#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <utility>

#include "base/error.hpp"
#include "driver/context.hpp"
#include "driver/device.hpp"
#include "driver/device_memory.hpp"
#include "driver/event.hpp"
#include "driver/pinned_region.hpp"
#include "driver/stream.hpp"
#include "driver/virtual_memory.hpp"

namespace {

using namespace spillover;

void expect(bool condition, const char* sentence) {
  std::printf("%s: %s\n", condition ? "ok" : "FAILED", sentence);
  if (!condition) std::exit(1);
}

template <class Error, class Action>
void expect_error(Action action, const char* sentence) {
  bool was_thrown = false;
  try {
    action();
  } catch (const Error& error) {
    std::printf("  %s\n", error.what());
    was_thrown = true;
  }
  expect(was_thrown, sentence);
}

size_t free_bytes() {
  return memory_info(0).free_bytes;
}

void check_streams_and_events() {
  Stream stream(0);
  expect(stream.handle() != nullptr, "a stream has a handle");
  expect(stream.is_idle(), "a new stream is idle");
  expect(!stream_is_capturing(stream.handle()), "a new stream captures nothing");
  Event event(0);
  expect(event.is_complete(), "an event that was never recorded is complete");
  event.record(stream.handle());
  event.synchronize();
  expect(event.is_complete(), "a recorded event completes");

  Stream other(0);
  other.wait(event);
  other.synchronize();
  const StreamHandle handle = other.handle();
  Stream moved(std::move(other));
  expect(moved.handle() == handle && other.handle() == nullptr, "moving takes the stream over");
  stream = std::move(moved);
  expect(stream.handle() == handle, "move assignment takes the stream over");

  expect(event.try_record(stream.handle()) == RecordOutcome::kRecorded,
         "an event is recorded on a live stream");
  stream.synchronize();
  expect(stream_activity(0, stream.handle()) == StreamActivity::kIdle,
         "a stream is idle once it was waited for");
  Event survivor(0);
  {
    Stream brief(0);
    survivor.record(brief.handle());
  }
  survivor.synchronize();
  expect(survivor.is_complete(), "an event outlives its stream");
}

void check_virtual_memory() {
  expect(supports_virtual_memory(0), "the device has virtual memory");
  const size_t page_bytes = allocation_granularity(0);
  expect(page_bytes > 0 && (page_bytes & (page_bytes - 1)) == 0, "granularity is a power of two");
  const size_t before = free_bytes();
  const AddressReservation reservation(0, 4 * page_bytes);
  expect(free_bytes() == before, "a reservation takes no memory");
  std::optional<PhysicalMemory> memory = PhysicalMemory::try_create(0, page_bytes);
  expect(free_bytes() == before - page_bytes, "physical memory takes its size");
  const int devices[] = {0};
  const DeviceAddress second = reservation.address() + page_bytes;
  map_memory(reservation.address(), *memory);
  map_memory(second, *memory);
  allow_access(reservation.address(), 2 * page_bytes, devices);
  expect_error<DriverError>([&] { map_memory(second, *memory); }, "a range cannot be mapped twice");
  PhysicalMemory moved(std::move(*memory));
  moved.release();
  expect(free_bytes() == before - page_bytes, "a mapping keeps its memory alive");
  unmap_memory(0, reservation.address(), 2 * page_bytes);
  expect(free_bytes() == before, "the last unmapping gives the memory back");
  expect_error<DriverError>([&] { unmap_memory(0, second, page_bytes); },
                            "what is not mapped cannot be unmapped");
  expect(!PhysicalMemory::try_create(0, memory_info(0).total_bytes + page_bytes),
         "no memory is an answer, not an error");
}

void check_device_memory() {
  const size_t before = free_bytes();
  {
    auto memory = DeviceMemory::try_allocate(0, size_t{4} << 20);
    expect(memory.has_value() && memory->address() != 0, "device memory is allocated");
    DeviceMemory moved(std::move(*memory));
    expect(free_bytes() < before, "device memory takes space");
    moved.release();
    expect(moved.address() == 0, "released memory has no address");
  }
  expect(free_bytes() == before, "device memory is given back once");
  expect(!DeviceMemory::try_allocate(0, memory_info(0).total_bytes + (size_t{2} << 20)),
         "no memory is an answer, not an error");
}

void check_pinned_region() {
  const size_t size_bytes = size_t{64} << 10;
  void* pages =
      mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  expect(pages != MAP_FAILED, "host memory is there");
  {
    PinnedRegion region(0, pages, size_bytes);
    expect_error<DriverError>([&] { PinnedRegion(0, pages, size_bytes); },
                              "memory cannot be pinned twice");
    PinnedRegion moved(std::move(region));
    expect(moved.address() == pages && region.address() == nullptr, "moving takes the region");
  }
  PinnedRegion again(0, pages, size_bytes);
  expect(again.size_bytes() == size_bytes, "unpinned memory can be pinned again");
  expect_error<ConfigError>([&] { PinnedRegion(0, static_cast<char*>(pages) + 8, size_bytes); },
                            "a region that is not whole pages is refused");
  // `pages` is left mapped: the region must not outlive it.
}

void check_contexts() {
  PrimaryContext context(0);
  PrimaryContext moved(std::move(context));
  expect(context.handle() == nullptr && moved.handle() != nullptr, "moving takes the context");
  expect(&PrimaryContext::of(0) == &PrimaryContext::of(0), "a device has one kept context");
  expect_error<ConfigError>([] { PrimaryContext::of(63); }, "device 63 does not exist");
  const ContextScope outer(0);
  const ContextScope inner(0);
  const RelaxedCaptureScope relaxed;
  synchronize_device(0);
  expect(true, "scopes nest");
}

// A destructor whose driver call fails reports it and goes on.
void check_failing_release() {
  const size_t size_bytes = size_t{64} << 10;
  void* pages =
      mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  {
    PinnedRegion region(0, pages, size_bytes);
    void* driver = dlopen("libcuda.so.1", RTLD_NOW);
    const auto unpin = reinterpret_cast<int (*)(void*)>(dlsym(driver, "cuMemHostUnregister"));
    const ContextScope scope(0);
    expect(unpin != nullptr && unpin(pages) == 0,
           "the memory is unpinned behind the region's back");
  }
  expect(true, "the destructor returned");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "failing-release") == 0) {
    check_failing_release();
    return 0;
  }
  expect(driver_available() && driver_version() >= 12000, "there is a driver");
  check_contexts();
  check_streams_and_events();
  check_virtual_memory();
  check_device_memory();
  check_pinned_region();
  return 0;
}
