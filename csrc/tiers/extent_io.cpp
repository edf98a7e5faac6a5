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

namespace spillover {
namespace {

constexpr size_t kBounceBytes = kMiB;

// How much of the memory can be given to the disk as it is.
size_t direct_bytes(const std::byte* data, size_t size_bytes) {
  if (reinterpret_cast<uintptr_t>(data) % kDiskBlockBytes != 0) return 0;
  return round_down(size_bytes, kDiskBlockBytes);
}

}  // namespace

void ExtentIo::FreeDeleter::operator()(std::byte* pointer) const noexcept {
  std::free(pointer);
}

ExtentIo::ExtentIo()
    : bounce_(static_cast<std::byte*>(std::aligned_alloc(kDiskBlockBytes, kBounceBytes))) {
  if (!bounce_) throw std::bad_alloc();
}

uint32_t ExtentIo::write(const ScratchFile& file, const Extent& extent, const std::byte* data) {
  annotate_host_access("disk write", data, extent.size_bytes, HostAccess::kRead);
  const uint32_t crc = crc32c(data, extent.size_bytes);
  size_t done = direct_bytes(data, extent.size_bytes);
  if (done > 0) file.write_at(data, done, extent.offset);
  while (done < extent.size_bytes) {
    const size_t count = std::min(extent.size_bytes - done, kBounceBytes);
    const size_t padded = round_up(count, kDiskBlockBytes);
    std::memcpy(bounce_.get(), data + done, count);
    std::memset(bounce_.get() + count, 0, padded - count);
    file.write_at(bounce_.get(), padded, extent.offset + done);
    done += count;
  }
  return crc;
}

void ExtentIo::read(const ScratchFile& file, const Extent& extent, std::byte* data) {
  annotate_host_access("disk read", data, extent.size_bytes, HostAccess::kWrite);
  size_t done = direct_bytes(data, extent.size_bytes);
  if (done > 0) file.read_at(data, done, extent.offset);
  while (done < extent.size_bytes) {
    const size_t count = std::min(extent.size_bytes - done, kBounceBytes);
    file.read_at(bounce_.get(), round_up(count, kDiskBlockBytes), extent.offset + done);
    std::memcpy(data + done, bounce_.get(), count);
    done += count;
  }
  const uint32_t found = crc32c(data, extent.size_bytes);
  if (found == extent.crc32c) return;
  std::array<char, 64> sums{};
  std::snprintf(sums.data(), sums.size(), "CRC32C is %08x and was %08x", found, extent.crc32c);
  throw CorruptDataError(format_bytes(extent.size_bytes) + " at offset " +
                             std::to_string(extent.offset) + " of the scratch file in " +
                             file.folder() + " changed on the disk: " + sums.data() +
                             ". Check that device; the run cannot go on with this data",
                         file.folder(), EIO);
}

}  // namespace spillover
