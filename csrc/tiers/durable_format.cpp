#include "tiers/durable_format.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string_view>

#include "base/bytes.hpp"
#include "base/crc32c.hpp"
#include "base/error.hpp"
#include "tiers/extent_space.hpp"

namespace spillover {
namespace {

constexpr std::string_view kHeaderMagic = "SPLVDURA";
constexpr std::string_view kRecordMagic = "SPLVCOMM";
constexpr uint32_t kVersion = 1;
constexpr size_t kSumBytes = sizeof(uint32_t);
constexpr size_t kManifestHeadBytes = 8 + 8 + 1 + 8;
constexpr size_t kManifestExtentBytes = 5;

class Writer {
 public:
  template <typename Number>
  void number(Number value) {
    for (size_t i = 0; i < sizeof value; ++i) bytes_.push_back(std::byte(value >> (8 * i)));
  }
  void raw(ByteSpan data) { bytes_.insert(bytes_.end(), data.begin(), data.end()); }
  void text(std::string_view text) { raw(std::as_bytes(std::span(text))); }

  Bytes take() { return std::move(bytes_); }
  // One block, zeros behind what was written, its checksum at the end.
  Bytes take_block() {
    bytes_.resize(kDiskBlockBytes - kSumBytes);
    number(crc32c(bytes_.data(), bytes_.size()));
    return take();
  }
  Bytes take_blocks() {
    bytes_.resize(round_up(bytes_.size(), kDiskBlockBytes));
    return take();
  }

 private:
  Bytes bytes_;
};

// Reads past the end give zeros and are remembered.
class Reader {
 public:
  explicit Reader(ByteSpan data) : data_(data) {}

  template <typename Number>
  Number number() {
    Number value = 0;
    const ByteSpan bytes = raw(sizeof value);
    for (size_t i = 0; i < bytes.size(); ++i) {
      value |= static_cast<Number>(static_cast<Number>(bytes[i]) << (8 * i));
    }
    return value;
  }
  ByteSpan raw(uint64_t size_bytes) {
    if (size_bytes > data_.size()) {
      is_short_ = true;
      return {};
    }
    const ByteSpan found = data_.first(size_bytes);
    data_ = data_.subspan(size_bytes);
    return found;
  }
  std::string_view text(size_t size_bytes) {
    const ByteSpan found = raw(size_bytes);
    return {reinterpret_cast<const char*>(found.data()), found.size()};
  }
  size_t left_bytes() const { return data_.size(); }
  bool is_short() const { return is_short_; }

 private:
  ByteSpan data_;
  bool is_short_ = false;
};

bool has_sum(ByteSpan block) {
  if (block.size() != kDiskBlockBytes) return false;
  const size_t summed_bytes = block.size() - kSumBytes;
  Reader sum(block.subspan(summed_bytes));
  return crc32c(block.data(), summed_bytes) == sum.number<uint32_t>();
}

}  // namespace

Bytes encode_header(const DurableHeader& header) {
  Writer writer;
  writer.text(kHeaderMagic);
  writer.number(kVersion);
  writer.number(header.folder_index);
  writer.number(header.shape.folder_count);
  writer.raw(header.shape.id);
  writer.number(header.shape.extent_bytes_max);
  writer.number(header.shape.extra_bytes_max);
  writer.number(header.table_bytes);
  writer.number(header.table_crc32c);
  return writer.take_block();
}

std::optional<DurableHeader> decode_header(ByteSpan block, const std::string& file) {
  if (!has_sum(block)) return std::nullopt;
  Reader reader(block);
  if (reader.text(kHeaderMagic.size()) != kHeaderMagic) return std::nullopt;
  const auto version = reader.number<uint32_t>();
  if (version != kVersion) {
    throw StorageError(file + " has format version " + std::to_string(version) +
                           ", and this Spillover knows version " + std::to_string(kVersion) +
                           ": use the Spillover that made it",
                       file, ENOTSUP);
  }
  DurableHeader header;
  header.folder_index = reader.number<uint32_t>();
  header.shape.folder_count = reader.number<uint32_t>();
  const ByteSpan id = reader.raw(header.shape.id.size());
  std::copy(id.begin(), id.end(), header.shape.id.begin());
  header.shape.extent_bytes_max = reader.number<uint64_t>();
  header.shape.extra_bytes_max = reader.number<uint64_t>();
  header.table_bytes = reader.number<uint64_t>();
  header.table_crc32c = reader.number<uint32_t>();
  return header;
}

Bytes encode_table(const std::vector<DurableEntry>& entries) {
  Writer writer;
  writer.number<uint64_t>(entries.size());
  for (const DurableEntry& entry : entries) {
    writer.number(entry.size_bytes);
    writer.number(static_cast<uint16_t>(entry.name.size()));
    writer.text(entry.name);
  }
  return writer.take_blocks();
}

std::optional<std::vector<DurableEntry>> decode_table(ByteSpan table) {
  Reader reader(table);
  const auto count = reader.number<uint64_t>();
  std::vector<DurableEntry> entries;
  for (uint64_t i = 0; i < count && !reader.is_short(); ++i) {
    const auto size_bytes = reader.number<uint64_t>();
    const auto name_bytes = reader.number<uint16_t>();
    entries.push_back({std::string(reader.text(name_bytes)), size_bytes});
  }
  if (reader.is_short()) return std::nullopt;
  return entries;
}

Bytes encode_record(const DurableRecord& record, const std::array<std::byte, 16>& id) {
  Writer writer;
  writer.text(kRecordMagic);
  writer.number(kVersion);
  writer.raw(id);
  writer.number(record.sequence);
  writer.number(record.manifest_slot);
  writer.number(record.manifest_bytes);
  writer.number(record.manifest_crc32c);
  return writer.take_block();
}

std::optional<DurableRecord> decode_record(ByteSpan block, const std::array<std::byte, 16>& id) {
  if (!has_sum(block)) return std::nullopt;
  Reader reader(block);
  if (reader.text(kRecordMagic.size()) != kRecordMagic) return std::nullopt;
  if (reader.number<uint32_t>() != kVersion) return std::nullopt;
  if (!std::ranges::equal(reader.raw(id.size()), id)) return std::nullopt;
  DurableRecord record;
  record.sequence = reader.number<uint64_t>();
  record.manifest_slot = reader.number<uint32_t>();
  record.manifest_bytes = reader.number<uint64_t>();
  record.manifest_crc32c = reader.number<uint32_t>();
  return record;
}

Bytes encode_manifest(const DurableManifest& manifest, uint64_t sequence) {
  Writer writer;
  writer.number(sequence);
  writer.number<uint64_t>(manifest.extents.size());
  for (const DurableManifest::Extent& extent : manifest.extents) {
    writer.number(extent.crc32c);
    writer.number(extent.slot);
  }
  writer.number(manifest.extra_kind);
  writer.number<uint64_t>(manifest.extra.size());
  writer.raw(manifest.extra);
  return writer.take();
}

uint64_t manifest_bytes_max(size_t extent_count, uint64_t extra_bytes_max) {
  return round_up(kManifestHeadBytes + kManifestExtentBytes * extent_count + extra_bytes_max,
                  kDiskBlockBytes);
}

std::optional<DurableManifest> decode_manifest(ByteSpan bytes, uint64_t sequence) {
  Reader reader(bytes);
  if (reader.number<uint64_t>() != sequence) return std::nullopt;
  const auto count = reader.number<uint64_t>();
  if (count > reader.left_bytes() / kManifestExtentBytes) return std::nullopt;
  DurableManifest manifest;
  manifest.extents.resize(count);
  for (DurableManifest::Extent& extent : manifest.extents) {
    extent.crc32c = reader.number<uint32_t>();
    extent.slot = reader.number<uint8_t>();
    if (extent.slot > 1 && extent.slot != kNoSlot) return std::nullopt;
  }
  manifest.extra_kind = reader.number<uint8_t>();
  const ByteSpan extra = reader.raw(reader.number<uint64_t>());
  manifest.extra.assign(extra.begin(), extra.end());
  if (reader.is_short()) return std::nullopt;
  return manifest;
}

}  // namespace spillover
