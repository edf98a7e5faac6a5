#include "tiers/block_file.hpp"

#include <cerrno>
#include <cstring>

#include "base/bytes.hpp"
#include "base/error.hpp"
#include "tiers/file_operations.hpp"

namespace spillover {

void BlockFile::transfer(TransferDirection direction, std::byte* data, size_t size_bytes,
                         uint64_t offset, uint32_t& resubmits) const {
  TransferProgress progress(direction, size_bytes);
  auto next = TransferProgress::Next::kRepeat;
  for (bool is_first = true; next == TransferProgress::Next::kRepeat; is_first = false) {
    if (!is_first) ++resubmits;
    const size_t done_bytes = progress.done_bytes();
    next = progress.advance(file_operations().transfer(descriptor_, direction, data + done_bytes,
                                                       progress.left_bytes(), offset + done_bytes));
  }
  if (next == TransferProgress::Next::kFailed) throw_failure(progress, offset);
}

void BlockFile::throw_failure(const TransferProgress& progress, uint64_t offset) const {
  offset += progress.done_bytes();
  if (progress.is_cut()) {
    throw CorruptDataError(name() + " ends at offset " + std::to_string(offset) + ", where " +
                               format_bytes(progress.left_bytes()) +
                               " more were written: it was cut by another program",
                           folder_, EIO);
  }
  throw_error(progress.direction() == TransferDirection::kWrite ? "writing" : "reading", offset,
              progress.left_bytes(), progress.native_error());
}

void BlockFile::throw_error(const char* operation, uint64_t offset, size_t size_bytes,
                            int native_error) const {
  const std::string message = std::string(operation) + " " + format_bytes(size_bytes) +
                              " at offset " + std::to_string(offset) + " of " + name() +
                              " failed: " + describe_errno(native_error);
  if (means_full(native_error)) {
    throw DiskFullError(message + ". Free space there, or add another folder", folder_,
                        native_error);
  }
  throw StorageError(message, folder_, native_error);
}

std::string describe_errno(int native_error) {
  return std::string(std::strerror(native_error)) + " (errno " + std::to_string(native_error) + ")";
}

bool means_full(int native_error) {
  return native_error == ENOSPC || native_error == EDQUOT;
}

}  // namespace spillover
