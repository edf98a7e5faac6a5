// What a transfer engine keeps: bytes that left the device, cut into chunks where there is a disk.
//
// Chunks let the copies of one half of a payload overlap with the disk's work on the other, and let
// payloads larger than the host's budget pass through it. Everything but the constants is guarded
// by the engine's mutex. PRIVATE to transfer/, but for the pointer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "tiers/disk_store.hpp"
#include "tiers/host_pool.hpp"
#include "transfer/copy_mark.hpp"
#include "transfer/residency.hpp"

namespace spillover {

struct Chunk {
  size_t offset_bytes = 0;  // In the payload. Constant.
  size_t size_bytes = 0;    // Constant.
  Residency residency;
  // Memory for as long as residency.host() is not kNone. Its address may be used without the mutex
  // by who has made sure that the copy stays (a reader, a write).
  HostBuffer host;
  // Behind the copy from the device; null before it is on the stream, and once it is known to be
  // over. Set while the copy is leaving: nobody may rely on the copy before.
  std::shared_ptr<CopyMark> left;
  std::shared_ptr<DiskPayload> stored;  // While residency.disk() is kValid.
  std::shared_ptr<Ticket> disk_work;    // Of the write or read under way.
  uint64_t write_failed_at = 0;         // Number of the last request for memory before it did.
};

struct Payload : std::enable_shared_from_this<Payload> {
  // Where nothing is known of the next use, it counts as farther than any that is known.
  static constexpr uint64_t kNoUse = UINT64_MAX;

  uint64_t engine = 0;    // Constant. Number of the engine that keeps it.
  size_t size_bytes = 0;  // Constant.
  uint64_t number = 0;    // Constant. Older payloads have smaller ones.
  std::vector<Chunk> chunks;
  uint64_t next_use = kNoUse;
  size_t host_chunks = 0;  // With memory on the host.
  bool is_dropped = false;
};

// Farthest next use last; of those of which nothing is known, the oldest last.
struct SoonerUse {
  bool operator()(const Payload* first, const Payload* second) const {
    if (first->next_use != second->next_use) return first->next_use < second->next_use;
    return first->number > second->number;
  }
};

}  // namespace spillover
