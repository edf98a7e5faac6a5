// How far one transfer of whole blocks has come, and what each result of the system means for it.
// Every disk engine decides by this; see Note [Short transfers] in the .cpp.
//
// Not thread-safe: a value of the thread that makes the transfer.
#pragma once

#include <sys/types.h>

#include <cstddef>

namespace spillover {

enum class TransferDirection { kWrite, kRead };

class TransferProgress {
 public:
  enum class Next {
    kDone,    // Everything is moved.
    kRepeat,  // Transfer what is left.
    kFailed,  // native_error() or is_cut() says why.
  };

  TransferProgress(TransferDirection direction, size_t size_bytes)
      : direction_(direction), left_bytes_(size_bytes) {}

  // result: the bytes that were moved of what was left, or an errno below zero.
  Next advance(ssize_t result) noexcept;

  TransferDirection direction() const { return direction_; }
  size_t done_bytes() const { return done_bytes_; }
  size_t left_bytes() const { return left_bytes_; }
  int native_error() const { return native_error_; }
  // The file ended inside of what was read.
  bool is_cut() const { return is_cut_; }

 private:
  Next fail(int native_error) noexcept;

  TransferDirection direction_;
  size_t done_bytes_ = 0;
  size_t left_bytes_;
  int attempts_ = 0;  // In a row that moved nothing.
  int native_error_ = 0;
  bool is_cut_ = false;
};

}  // namespace spillover
