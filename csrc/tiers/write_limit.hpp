// How many bytes a store may write, to spare flash memory, and how many it has written.
//
// Thread-safe; no method blocks. PRIVATE to tiers/.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

namespace spillover {

class WriteLimit {
 public:
  explicit WriteLimit(uint64_t limit_bytes) : limit_bytes_(limit_bytes) {}

  // Counts bytes that are about to be written. Past the limit it counts none of them and throws
  // DiskFullError (EDQUOT), which names the folder.
  void add(uint64_t size_bytes, const std::string& folder);
  // They are not written after all.
  void take_back(uint64_t size_bytes) noexcept { written_bytes_ -= size_bytes; }

  uint64_t written_bytes() const { return written_bytes_; }

 private:
  const uint64_t limit_bytes_;
  std::atomic<uint64_t> written_bytes_{0};
};

}  // namespace spillover
