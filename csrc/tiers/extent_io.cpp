#include "tiers/extent_io.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>

#include "base/bytes.hpp"
#include "base/crc32c.hpp"
#include "base/error.hpp"
#include "tiers/host_annotation.hpp"
#include "trace/span.hpp"

namespace spillover {
namespace {

constexpr size_t kBounceBytes = kMiB;

constexpr TraceLabel kChecksum{"checksum", "disk"};

}  // namespace

void FreeMemory::operator()(std::byte* pointer) const noexcept {
  std::free(pointer);
}

BlockMemory allocate_blocks(size_t size_bytes) {
  BlockMemory memory(static_cast<std::byte*>(std::aligned_alloc(kDiskBlockBytes, size_bytes)));
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

size_t direct_bytes(const std::byte* data, size_t size_bytes) {
  if (reinterpret_cast<uintptr_t>(data) % kDiskBlockBytes != 0) return 0;
  return round_down(size_bytes, kDiskBlockBytes);
}

uint32_t timed_crc32c(const std::byte* data, size_t size_bytes, ExtentNotes& notes) {
  const TraceSpan span(kChecksum, size_bytes);
  const int64_t begin_ns = trace_now_ns();
  const uint32_t sum = crc32c(data, size_bytes);
  notes.checksum_ns += trace_now_ns() - begin_ns;
  return sum;
}

void check_sum(const BlockFile& file, const Extent& extent, uint32_t crc32c) {
  if (crc32c == extent.crc32c) return;
  std::array<char, 64> sums{};
  std::snprintf(sums.data(), sums.size(), "CRC32C is %08x and was %08x", crc32c, extent.crc32c);
  throw CorruptDataError(format_bytes(extent.size_bytes) + " at offset " +
                             std::to_string(extent.offset) + " of " + file.name() +
                             " changed on the disk: " + sums.data() +
                             ". Check that device; the run cannot go on with this data",
                         file.folder(), EIO);
}

ExtentIo::ExtentIo() : bounce_(allocate_blocks(kBounceBytes)) {}

uint32_t ExtentIo::write(const BlockFile& file, const Extent& extent, std::byte* data,
                         ExtentNotes& notes) {
  annotate_host_access("disk write", data, extent.size_bytes, HostAccess::kRead);
  const uint32_t crc = timed_crc32c(data, extent.size_bytes, notes);
  size_t done = direct_bytes(data, extent.size_bytes);
  if (done > 0) {
    file.transfer(TransferDirection::kWrite, data, done, extent.offset, notes.resubmits);
  }
  while (done < extent.size_bytes) {
    const size_t count = std::min(extent.size_bytes - done, kBounceBytes);
    const size_t padded = round_up(count, kDiskBlockBytes);
    std::memcpy(bounce_.get(), data + done, count);
    std::memset(bounce_.get() + count, 0, padded - count);
    file.transfer(TransferDirection::kWrite, bounce_.get(), padded, extent.offset + done,
                  notes.resubmits);
    done += count;
  }
  return crc;
}

void ExtentIo::read(const BlockFile& file, const Extent& extent, std::byte* data,
                    ExtentNotes& notes) {
  annotate_host_access("disk read", data, extent.size_bytes, HostAccess::kWrite);
  size_t done = direct_bytes(data, extent.size_bytes);
  if (done > 0) {
    file.transfer(TransferDirection::kRead, data, done, extent.offset, notes.resubmits);
  }
  while (done < extent.size_bytes) {
    const size_t count = std::min(extent.size_bytes - done, kBounceBytes);
    file.transfer(TransferDirection::kRead, bounce_.get(), round_up(count, kDiskBlockBytes),
                  extent.offset + done, notes.resubmits);
    std::memcpy(data + done, bounce_.get(), count);
    done += count;
  }
  check_sum(file, extent, timed_crc32c(data, extent.size_bytes, notes));
}

}  // namespace spillover
