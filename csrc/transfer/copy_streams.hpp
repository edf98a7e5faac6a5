// The two streams of a device that bytes are copied on between it and the host: one out of it, one
// into it, so that copies of both directions overlap with each other and with compute. Whoever
// moves bytes of the process uses them, Python's offloading too.
//
// Made at first use and leaked: no CUDA call may run from a static destructor. Thread-safe.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "driver/stream.hpp"

namespace spillover {

enum class CopyDirection { kOut, kIn };

// What a stream was asked for so far. A copy may be of several pieces.
struct CopyCounts {
  uint64_t copies = 0;
  uint64_t bytes = 0;
};

class CopyStreams {
 public:
  // Throws ConfigError for a device that does not exist, DriverError.
  static CopyStreams& of(int device);

  const Stream& out() const { return out_; }
  const Stream& in() const { return in_; }
  const Stream& stream(CopyDirection direction) const {
    return direction == CopyDirection::kOut ? out_ : in_;
  }

  // Whoever has put a copy on a stream says so.
  void count(CopyDirection direction, size_t size_bytes) noexcept {
    Counters& counters = counters_[static_cast<size_t>(direction)];
    counters.copies.fetch_add(1, std::memory_order_relaxed);
    counters.bytes.fetch_add(size_bytes, std::memory_order_relaxed);
  }
  CopyCounts counts(CopyDirection direction) const noexcept {
    const Counters& counters = counters_[static_cast<size_t>(direction)];
    return {counters.copies.load(std::memory_order_relaxed),
            counters.bytes.load(std::memory_order_relaxed)};
  }

 private:
  struct Counters {
    std::atomic<uint64_t> copies{0};
    std::atomic<uint64_t> bytes{0};
  };

  explicit CopyStreams(int device) : out_(device), in_(device) {}

  const Stream out_;
  const Stream in_;
  std::array<Counters, 2> counters_;
};

}  // namespace spillover
