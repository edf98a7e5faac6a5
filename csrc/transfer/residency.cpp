#include "transfer/residency.hpp"

#include "base/check.hpp"

namespace spillover {

void Residency::begin_leaving() {
  SPILLOVER_CHECK(host_ == HostCopy::kNone && disk_ == DiskCopy::kNone && !is_dropped_,
                  "a chunk leaves the device once");
  host_ = HostCopy::kLeaving;
}

void Residency::has_left() {
  SPILLOVER_CHECK(host_ == HostCopy::kLeaving, "only a chunk that leaves can have left");
  host_ = HostCopy::kValid;
}

void Residency::leaving_failed() {
  SPILLOVER_CHECK(host_ == HostCopy::kLeaving && disk_ == DiskCopy::kNone,
                  "a copy that others rely on cannot be taken back");
  host_ = HostCopy::kNone;
}

void Residency::begin_writing() {
  SPILLOVER_CHECK(is_dirty(), "only what the host alone has is written");
  disk_ = DiskCopy::kWriting;
}

void Residency::has_written() {
  SPILLOVER_CHECK(disk_ == DiskCopy::kWriting && is_at_hand(), "nobody writes this chunk");
  disk_ = DiskCopy::kValid;
}

void Residency::writing_failed() {
  SPILLOVER_CHECK(disk_ == DiskCopy::kWriting && is_at_hand(), "nobody writes this chunk");
  disk_ = DiskCopy::kNone;
}

void Residency::begin_reading() {
  SPILLOVER_CHECK(is_on_disk_only(), "only what the disk alone has is read");
  host_ = HostCopy::kReading;
}

void Residency::has_read() {
  SPILLOVER_CHECK(host_ == HostCopy::kReading, "nobody reads this chunk");
  host_ = HostCopy::kValid;
}

void Residency::reading_failed() {
  SPILLOVER_CHECK(host_ == HostCopy::kReading, "nobody reads this chunk");
  host_ = HostCopy::kNone;
}

void Residency::add_reader() {
  SPILLOVER_CHECK(!is_dropped_, "a dropped chunk has no readers");
  ++readers_;
}

void Residency::remove_reader() {
  SPILLOVER_CHECK(readers_ > 0, "a reader left that never came");
  --readers_;
}

bool Residency::can_evict() const {
  return host_ == HostCopy::kValid && disk_ == DiskCopy::kValid && readers_ == 0;
}

void Residency::evict() {
  SPILLOVER_CHECK(can_evict(), "this copy is in use, or the only one");
  host_ = HostCopy::kNone;
}

void Residency::drop() {
  is_dropped_ = true;
}

bool Residency::is_over() const {
  return host_ != HostCopy::kLeaving && host_ != HostCopy::kReading &&
         disk_ != DiskCopy::kWriting && readers_ == 0;
}

const char* Residency::name() const {
  if (is_dropped_) return "dropped";
  switch (host_) {
    case HostCopy::kLeaving:
      return "leaving";
    case HostCopy::kReading:
      return "reading";
    case HostCopy::kValid:
      if (readers_ > 0) return "arriving";
      return disk_ == DiskCopy::kNone      ? "host"
             : disk_ == DiskCopy::kWriting ? "writing"
                                           : "host and disk";
    case HostCopy::kNone:
      break;
  }
  return disk_ == DiskCopy::kValid ? "disk" : "device";
}

bool Residency::is_valid() const {
  if (host_ == HostCopy::kReading && disk_ != DiskCopy::kValid) return false;
  return disk_ != DiskCopy::kWriting || is_at_hand();
}

}  // namespace spillover
