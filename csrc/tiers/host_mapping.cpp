#include "tiers/host_mapping.hpp"

#include <linux/mman.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
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

HostMapping::HostMapping(size_t size_bytes, const HostMappingOptions& options,
                         const std::function<size_t(std::byte*)>& before_pinning)
    : size_bytes_(size_bytes) {
  SPILLOVER_CHECK(size_bytes > 0 && size_bytes % host_page_bytes() == 0,
                  "host mappings are whole pages");
  map_pages(options.huge_pages);
  try {
    if (options.numa_node) numa_note_ = prefer_numa_node(address_, size_bytes, *options.numa_node);
    if (before_pinning) {
      huge_page_bytes_ = std::max(huge_page_bytes_, before_pinning(address_));
    }
    if (options.pinning == Pinning::kPageable) return;
    const TraceSpan span(kPin, size_bytes);
    const Timer timer(g_pin_ns);
    pinned_.emplace(options.device, address_, size_bytes);
    ++g_pin_count;
    g_pinned_bytes += size_bytes;
  } catch (...) {
    munmap(address_, size_bytes);
    throw;
  }
}

void HostMapping::map_pages(HugePages huge_pages) {
  void* address = MAP_FAILED;
  if (huge_pages == HugePages::kReserved && size_bytes_ % kHugePageBytes == 0) {
    // The kernel sets the pages aside here, so that touching them cannot fail later.
    address = mmap(nullptr, size_bytes_, kProtection, kFlags | MAP_HUGETLB | MAP_HUGE_2MB, -1, 0);
    if (address != MAP_FAILED) huge_page_bytes_ = size_bytes_;
  }
  if (huge_page_bytes_ == 0) {
    const bool is_aligned = huge_pages != HugePages::kNever && size_bytes_ >= kHugePageBytes;
    address = map_aligned(size_bytes_, is_aligned ? kHugePageBytes : host_page_bytes());
  }
  if (address == MAP_FAILED) {
    throw HostOutOfMemoryError("the system refused to map " + format_bytes(size_bytes_) +
                                   " of host memory: " + std::strerror(errno),
                               size_bytes_);
  }
  address_ = static_cast<std::byte*>(address);
  if (huge_page_bytes_ > 0) return;
  // Huge pages make the device's address translation cheaper; without them everything still works.
  madvise(address, size_bytes_, huge_pages == HugePages::kNever ? MADV_NOHUGEPAGE : MADV_HUGEPAGE);
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
