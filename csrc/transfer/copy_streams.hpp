// The two streams of a device that payloads are copied on: one out of it, one into it, so that
// copies of both directions overlap with each other and with compute.
//
// Made at first use and leaked: no CUDA call may run from a static destructor. Thread-safe.
#pragma once

#include "driver/stream.hpp"

namespace spillover {

class CopyStreams {
 public:
  // Throws ConfigError for a device that does not exist, DriverError.
  static const CopyStreams& of(int device);

  const Stream& out() const { return out_; }
  const Stream& in() const { return in_; }

 private:
  explicit CopyStreams(int device) : out_(device), in_(device) {}

  Stream out_;
  Stream in_;
};

}  // namespace spillover
