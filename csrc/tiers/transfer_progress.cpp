#include "tiers/transfer_progress.hpp"

#include <cerrno>

#include "base/bytes.hpp"
#include "tiers/extent_space.hpp"

namespace spillover {
namespace {

// How often a transfer is repeated that moves no whole block, before it counts as failed.
constexpr int kAttemptsMax = 1000;

size_t whole_blocks(ssize_t count, size_t size_bytes) {
  if (count <= 0) return 0;
  const auto moved_bytes = static_cast<size_t>(count);
  return moved_bytes >= size_bytes ? size_bytes : round_down(moved_bytes, kDiskBlockBytes);
}

}  // namespace

// Note [Short transfers]: O_DIRECT takes whole blocks only, so a transfer that ends inside a block
// is taken up again at that block's start. One that moves less than a block makes no progress and
// is repeated; so is one that was interrupted. Each has an end: a disk that never gets further has
// failed.
TransferProgress::Next TransferProgress::advance(ssize_t result) noexcept {
  const bool is_write = direction_ == TransferDirection::kWrite;
  if (result < 0 && result != -EINTR && result != -EAGAIN) return fail(static_cast<int>(-result));
  // A disk that fills up takes a part; the next attempt then says ENOSPC. A read that finds nothing
  // is past the file's end.
  if (result == 0) return fail(is_write ? ENOSPC : 0);
  const size_t moved_bytes = whole_blocks(result, left_bytes_);
  if (moved_bytes == 0) {
    if (++attempts_ < kAttemptsMax) return Next::kRepeat;
    if (result < 0) return fail(static_cast<int>(-result));
    return fail(is_write ? EIO : 0);
  }
  attempts_ = 0;
  done_bytes_ += moved_bytes;
  left_bytes_ -= moved_bytes;
  return left_bytes_ == 0 ? Next::kDone : Next::kRepeat;
}

TransferProgress::Next TransferProgress::fail(int native_error) noexcept {
  native_error_ = native_error;
  is_cut_ = native_error == 0;
  return Next::kFailed;
}

}  // namespace spillover
