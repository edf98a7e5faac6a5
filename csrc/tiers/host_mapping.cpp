#include "tiers/host_mapping.hpp"

#include <linux/mman.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
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

constexpr size_t kHugePageBytes = 2 * kMiB;

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
                         const std::function<void(std::byte*)>& before_pinning)
    : size_bytes_(size_bytes) {
  SPILLOVER_CHECK(size_bytes > 0 && size_bytes % host_page_bytes() == 0,
                  "host mappings are whole pages");
  map_pages(options.huge_pages);
  try {
    if (options.numa_node) numa_note_ = prefer_numa_node(address_, size_bytes, *options.numa_node);
    if (before_pinning) before_pinning(address_);
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
  constexpr int kProtection = PROT_READ | PROT_WRITE;
  constexpr int kFlags = MAP_SHARED | MAP_ANONYMOUS;
  void* address = MAP_FAILED;
  if (huge_pages == HugePages::kReserved && size_bytes_ % kHugePageBytes == 0) {
    // The kernel sets the pages aside here, so that touching them cannot fail later.
    address = mmap(nullptr, size_bytes_, kProtection, kFlags | MAP_HUGETLB | MAP_HUGE_2MB, -1, 0);
    is_huge_ = address != MAP_FAILED;
  }
  if (!is_huge_) address = mmap(nullptr, size_bytes_, kProtection, kFlags, -1, 0);
  if (address == MAP_FAILED) {
    throw HostOutOfMemoryError("the system refused to map " + format_bytes(size_bytes_) +
                                   " of host memory: " + std::strerror(errno),
                               size_bytes_);
  }
  address_ = static_cast<std::byte*>(address);
  if (is_huge_) return;
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
      is_huge_(other.is_huge_),
      numa_note_(std::move(other.numa_note_)),
      pinned_(std::move(other.pinned_)) {}

HostMapping& HostMapping::operator=(HostMapping&& other) noexcept {
  std::swap(address_, other.address_);
  std::swap(size_bytes_, other.size_bytes_);
  std::swap(is_huge_, other.is_huge_);
  std::swap(numa_note_, other.numa_note_);
  std::swap(pinned_, other.pinned_);
  return *this;
}

}  // namespace spillover
