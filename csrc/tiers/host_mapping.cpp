#include "tiers/host_mapping.hpp"

#include <linux/mman.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>
#include <utility>

#include "base/bytes.hpp"
#include "base/check.hpp"
#include "base/error.hpp"
#include "tiers/numa.hpp"
#include "trace/span.hpp"

namespace spillover {
namespace {

constexpr TraceLabel kPin{"pin host memory", "host"};
constexpr TraceLabel kUnpin{"unpin host memory", "host"};

std::atomic<uint64_t> g_pinned_bytes{0};
std::atomic<uint64_t> g_pin_count{0};
std::atomic<int64_t> g_pin_ns{0};
std::atomic<int64_t> g_unpin_ns{0};

// Adds the time of its life.
class Timer {
 public:
  explicit Timer(std::atomic<int64_t>& total_ns) : total_ns_(total_ns), begin_ns_(trace_now_ns()) {}
  ~Timer() { total_ns_ += trace_now_ns() - begin_ns_; }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;

 private:
  std::atomic<int64_t>& total_ns_;
  const int64_t begin_ns_;
};

constexpr int kProtection = PROT_READ | PROT_WRITE;
constexpr int kFlags = MAP_SHARED | MAP_ANONYMOUS;

// Note [Number of mappings]. The kernel bounds a process's mappings, and who is at the bound cannot
// even have memory from malloc. So a tenth is left to others.
std::atomic<size_t> g_mapping_count{0};

size_t mapping_count_max() {
  static const size_t count_max = [] {
    size_t found = 0;
    std::ifstream file("/proc/sys/vm/max_map_count");
    return file >> found ? found - found / 10 : SIZE_MAX;
  }();
  return count_max;
}

// Whole huge pages, and what is left, have mappings of their own: they are advised differently.
size_t mapping_count_of(size_t size_bytes) {
  return size_bytes > kHugePageBytes && size_bytes % kHugePageBytes != 0 ? 2 : 1;
}

void count_mapping(size_t size_bytes) {
  const size_t before = g_mapping_count.fetch_add(mapping_count_of(size_bytes));
  if (before < mapping_count_max()) return;
  g_mapping_count -= mapping_count_of(size_bytes);
  throw HostOutOfMemoryError(
      format_bytes(size_bytes) + " of host memory cannot be had: this process has " +
          std::to_string(before) +
          " such mappings, and vm.max_map_count allows few more. Raise it (sysctl), ask for larger "
          "buffers, or reserve memory ahead, which buffers are cut from",
      size_bytes);
}

// At a multiple of alignment, from its first byte: addresses are taken first, and the memory put
// there, since a huge page's place in the memory and its address must agree.
void* map_aligned(size_t size_bytes, size_t alignment) {
  const size_t spare_bytes = alignment - host_page_bytes();
  if (spare_bytes == 0) return mmap(nullptr, size_bytes, kProtection, kFlags, -1, 0);
  constexpr int kReserve = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* const taken = mmap(nullptr, size_bytes + spare_bytes, PROT_NONE, kReserve, -1, 0);
  if (taken == MAP_FAILED) return taken;
  auto* const first = static_cast<std::byte*>(taken);
  const size_t over = reinterpret_cast<uintptr_t>(first) % alignment;
  std::byte* const begin = first + (over == 0 ? 0 : alignment - over);
  const auto before_bytes = static_cast<size_t>(begin - first);
  void* const mapped = mmap(begin, size_bytes, kProtection, kFlags | MAP_FIXED, -1, 0);
  const int native_error = errno;
  if (before_bytes > 0) munmap(first, before_bytes);
  if (spare_bytes > before_bytes) munmap(begin + size_bytes, spare_bytes - before_bytes);
  if (mapped == MAP_FAILED) munmap(begin, size_bytes);
  errno = native_error;
  return mapped;
}

[[noreturn]] void throw_refused(size_t size_bytes, int native_error) {
  std::string message = "the system refused to map " + format_bytes(size_bytes) +
                        " of host memory: " + std::strerror(native_error);
  rlimit limit{};
  if (getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY) {
    message +=
        "; this process may have " + format_bytes(limit.rlim_cur) + " of addresses (ulimit -v)";
  }
  throw HostOutOfMemoryError(message, size_bytes);
}

std::byte* map_set_aside(size_t size_bytes) {
  constexpr int kHugeFlags = kFlags | MAP_HUGETLB | MAP_HUGE_2MB;
  void* const address = mmap(nullptr, size_bytes, kProtection, kHugeFlags, -1, 0);
  if (address == MAP_FAILED) throw_refused(size_bytes, errno);
  return static_cast<std::byte*>(address);
}

std::byte* map_ordinary(size_t size_bytes, HugePages huge_pages) {
  const bool is_aligned = huge_pages != HugePages::kNever && size_bytes >= kHugePageBytes;
  void* const mapped = map_aligned(size_bytes, is_aligned ? kHugePageBytes : host_page_bytes());
  if (mapped == MAP_FAILED) throw_refused(size_bytes, errno);
  auto* const address = static_cast<std::byte*>(mapped);
  // Huge pages make the device's address translation cheaper; without them everything still works.
  // Only whole ones: where shmem_enabled is "always", the kernel would put one behind the rest,
  // too, and that would be memory that nobody asked for and nobody counts.
  const size_t huge_bytes = is_aligned ? round_down(size_bytes, kHugePageBytes) : 0;
  if (huge_bytes > 0) madvise(address, huge_bytes, MADV_HUGEPAGE);
  if (size_bytes > huge_bytes) {
    madvise(address + huge_bytes, size_bytes - huge_bytes, MADV_NOHUGEPAGE);
  }
  return address;
}

}  // namespace

PinStats pin_stats() {
  return {g_pin_count, g_pinned_bytes, static_cast<double>(g_pin_ns) / 1e9,
          static_cast<double>(g_unpin_ns) / 1e9};
}

size_t host_page_bytes() {
  static const auto page_bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return page_bytes;
}

size_t mapped_bytes_for(size_t size_bytes, HugePages huge_pages) {
  const size_t in_pages = round_up(size_bytes, host_page_bytes());
  if (huge_pages != HugePages::kReserved) return in_pages;
  const size_t in_huge_pages = round_up(size_bytes, kHugePageBytes);
  return in_huge_pages - in_pages <= in_pages / 50 ? in_huge_pages : in_pages;
}

HostMapping::HostMapping(size_t size_bytes, const HostMappingOptions& options)
    : size_bytes_(size_bytes) {
  SPILLOVER_CHECK(size_bytes > 0 && size_bytes % host_page_bytes() == 0,
                  "host mappings are whole pages");
  count_mapping(size_bytes);
  try {
    if (options.source == PageSource::kSetAside) {
      SPILLOVER_CHECK(size_bytes % kHugePageBytes == 0, "whole huge pages are asked for");
      address_ = map_set_aside(size_bytes);
      huge_page_bytes_ = size_bytes;
    } else {
      address_ = map_ordinary(size_bytes, options.huge_pages);
    }
  } catch (...) {
    g_mapping_count -= mapping_count_of(size_bytes);
    throw;
  }
  if (options.numa_node) numa_note_ = prefer_numa_node(address_, size_bytes, *options.numa_node);
}

void HostMapping::populate(const PopulateOptions& options) {
  const size_t found_bytes = spillover::populate(address_, size_bytes_, options);
  huge_page_bytes_ = std::max(huge_page_bytes_, found_bytes);
}

void HostMapping::pin(int device) {
  const TraceSpan span(kPin, size_bytes_);
  const Timer timer(g_pin_ns);
  pinned_.emplace(device, address_, size_bytes_);
  ++g_pin_count;
  g_pinned_bytes += size_bytes_;
}

HostMapping::~HostMapping() {
  if (address_ == nullptr) return;
  const TraceSpan span(kUnpin, pinned_ ? size_bytes_ : 0);
  const Timer timer(g_unpin_ns);
  if (pinned_ && !pinned_->release()) {
    // The device may still reach these pages, so nobody else may get them.
    std::fprintf(stderr, "spillover: %s of host memory stays mapped, as it cannot be unpinned\n",
                 format_bytes(size_bytes_).c_str());
    return;
  }
  munmap(address_, size_bytes_);
  g_mapping_count -= mapping_count_of(size_bytes_);
}

HostMapping::HostMapping(HostMapping&& other) noexcept
    : address_(std::exchange(other.address_, nullptr)),
      size_bytes_(std::exchange(other.size_bytes_, 0)),
      huge_page_bytes_(other.huge_page_bytes_),
      numa_note_(std::move(other.numa_note_)),
      pinned_(std::move(other.pinned_)) {}

HostMapping& HostMapping::operator=(HostMapping&& other) noexcept {
  std::swap(address_, other.address_);
  std::swap(size_bytes_, other.size_bytes_);
  std::swap(huge_page_bytes_, other.huge_page_bytes_);
  std::swap(numa_note_, other.numa_note_);
  std::swap(pinned_, other.pinned_);
  return *this;
}

}  // namespace spillover
