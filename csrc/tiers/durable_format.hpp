// What a durable store has on its disks: the blocks that say what it is and what was committed
// last.
//
// Note [Files of a durable store]. Each folder has one file. It begins with a header block and the
// table of entries, the same in every folder but for the folder's number, which never change. In
// the first folder's file, the *primary*, two blocks with the commit record and two slots for the
// manifest follow; in all files then two slots, A and B, for each extent that lies there:
//
//   header | table | record, record | manifest A, manifest B | extents A ... | extents B ...
//
// The manifest says of every extent which slot was committed and what its checksum is, and carries
// the user's extra bytes. The record names the manifest that counts. Numbers are little-endian, and
// everything has a checksum (CRC-32C). The order of writes is in Note [Commit] of
// durable_commit.cpp.
//
// Values; free functions without state. PRIVATE to tiers/.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace spillover {

struct DurableEntry {
  std::string name;
  uint64_t size_bytes;

  bool operator==(const DurableEntry&) const = default;
};

// What a durable store is made with and keeps for good.
struct DurableShape {
  std::array<std::byte, 16> id{};  // Random: tells its files from another store's.
  uint32_t folder_count = 0;
  uint64_t extent_bytes_max = 0;
  uint64_t extra_bytes_max = 0;
  std::vector<DurableEntry> entries;
};

struct DurableHeader {
  DurableShape shape;  // Without entries, which the table has.
  uint32_t folder_index = 0;
  uint64_t table_bytes = 0;
  uint32_t table_crc32c = 0;
};

struct DurableRecord {
  uint64_t sequence = 0;  // Of the commit; 0: nothing was committed yet.
  uint32_t manifest_slot = 0;
  uint64_t manifest_bytes = 0;
  uint32_t manifest_crc32c = 0;
};

// No slot of an extent is committed.
inline constexpr uint8_t kNoSlot = 255;

struct DurableManifest {
  struct Extent {
    uint32_t crc32c = 0;
    uint8_t slot = kNoSlot;
  };
  std::vector<Extent> extents;
  uint8_t extra_kind = 0;  // Whatever the user of this layer means by it.
  std::vector<std::byte> extra;
};

using Bytes = std::vector<std::byte>;
using ByteSpan = std::span<const std::byte>;

// Whole blocks each. What encodes is never read back differently by the same version.
Bytes encode_header(const DurableHeader& header);
Bytes encode_table(const std::vector<DurableEntry>& entries);
Bytes encode_record(const DurableRecord& record, const std::array<std::byte, 16>& id);
// As long as it is, not rounded: its bytes have their checksum in the record.
Bytes encode_manifest(const DurableManifest& manifest, uint64_t sequence);
uint64_t manifest_bytes_max(size_t extent_count, uint64_t extra_bytes_max);

// Nothing where the bytes are not what an encoder made. A header of another version throws
// StorageError; file is for its message.
std::optional<DurableHeader> decode_header(ByteSpan block, const std::string& file);
std::optional<std::vector<DurableEntry>> decode_table(ByteSpan table);
std::optional<DurableRecord> decode_record(ByteSpan block, const std::array<std::byte, 16>& id);
std::optional<DurableManifest> decode_manifest(ByteSpan manifest, uint64_t sequence);

}  // namespace spillover
