#include "tiers/host_mapping.hpp"

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

}  // namespace

PinStats pin_stats() {
  return {g_pin_count, g_pinned_bytes, static_cast<double>(g_pin_ns) / 1e9,
          static_cast<double>(g_unpin_ns) / 1e9};
}

size_t host_page_bytes() {
  static const auto page_bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return page_bytes;
}

HostMapping::HostMapping(size_t size_bytes, Pinning pinning, int device) : size_bytes_(size_bytes) {
  SPILLOVER_CHECK(size_bytes > 0 && size_bytes % host_page_bytes() == 0,
                  "host mappings are whole pages");
  void* address =
      mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (address == MAP_FAILED) {
    throw HostOutOfMemoryError("the system refused to map " + format_bytes(size_bytes) +
                                   " of host memory: " + std::strerror(errno),
                               size_bytes);
  }
  // Huge pages make the device's address translation cheaper; without them everything still works.
  madvise(address, size_bytes, MADV_HUGEPAGE);
  address_ = static_cast<std::byte*>(address);
  if (pinning == Pinning::kPageable) return;
  const TraceSpan span(kPin, size_bytes);
  const Timer timer(g_pin_ns);
  try {
    pinned_.emplace(device, address, size_bytes);
    ++g_pin_count;
    g_pinned_bytes += size_bytes;
  } catch (...) {
    munmap(address, size_bytes);
    throw;
  }
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
      pinned_(std::move(other.pinned_)) {}

HostMapping& HostMapping::operator=(HostMapping&& other) noexcept {
  std::swap(address_, other.address_);
  std::swap(size_bytes_, other.size_bytes_);
  std::swap(pinned_, other.pinned_);
  return *this;
}

}  // namespace spillover
