#include "tiers/uring_buffers.hpp"

#include <algorithm>
#include <cerrno>

namespace spillover {

UringBuffers::UringBuffers(IoUring& ring)
    : ring_(ring), bounces_(allocate_blocks(kBouncesMax * kBounceBytes)) {
  for (size_t i = kBouncesMax; i-- > 0;) free_bounces_.push_back(i);
  register_bounces();
}

// As many as the limit on locked memory allows; the others work without.
void UringBuffers::register_bounces() {
  const auto described = [&](size_t i) { return iovec{bounce(i), kBounceBytes}; };
  if (ring_.make_buffer_table(kBouncesMax + kRegionsMax)) {
    while (registered_bounces_ < kBouncesMax &&
           ring_.set_buffer(static_cast<uint32_t>(registered_bounces_),
                            described(registered_bounces_)) == 0) {
      ++registered_bounces_;
    }
    for (size_t i = kRegionsMax; i-- > 0;) {
      free_regions_.push_back(static_cast<uint32_t>(kBouncesMax + i));
    }
    return;
  }
  for (size_t count = kBouncesMax; count > 0 && registered_bounces_ == 0; count /= 2) {
    std::vector<iovec> buffers;
    for (size_t i = 0; i < count; ++i) buffers.push_back(described(i));
    if (ring_.register_buffers(buffers) == 0) registered_bounces_ = count;
  }
}

std::string UringBuffers::notes() const {
  if (registered_bounces_ == kBouncesMax) return "";
  return "the limit on locked memory (ulimit -l) leaves " + std::to_string(registered_bounces_) +
         " of " + std::to_string(kBouncesMax) + " registered buffers";
}

std::optional<size_t> UringBuffers::take_bounce() noexcept {
  if (free_bounces_.empty()) return std::nullopt;
  const size_t index = free_bounces_.back();
  free_bounces_.pop_back();
  return index;
}

int UringBuffers::number_of_bounce(size_t index) const {
  return index < registered_bounces_ ? static_cast<int>(index) : -1;
}

size_t UringBuffers::add(std::byte* address, size_t size_bytes) {
  size_t done = 0;
  size_t step = kRegionBytesMax;
  while (done < size_bytes && step >= kBounceBytes && !free_regions_.empty()) {
    const size_t part_bytes = std::min(step, size_bytes - done);
    const uint32_t index = free_regions_.back();
    const int native_error = ring_.set_buffer(index, {address + done, part_bytes});
    if (native_error == ENOMEM) {
      step = part_bytes / 2;
      continue;
    }
    if (native_error != 0) break;
    free_regions_.pop_back();
    regions_[address + done] = {address, part_bytes, index};
    done += part_bytes;
  }
  return done;
}

void UringBuffers::remove(std::byte* owner) noexcept {
  for (auto region = regions_.lower_bound(owner);
       region != regions_.end() && region->second.owner == owner;) {
    // Where the kernel refuses, the table keeps the pages and the index is not used again.
    if (ring_.set_buffer(region->second.index, {}) == 0) {
      free_regions_.push_back(region->second.index);
    }
    region = regions_.erase(region);
  }
}

int UringBuffers::number_of(const std::byte* data, size_t size_bytes) const noexcept {
  auto region = regions_.upper_bound(const_cast<std::byte*>(data));
  if (region == regions_.begin()) return -1;
  --region;
  const auto into = static_cast<size_t>(data - region->first);
  if (into + size_bytes > region->second.size_bytes) return -1;
  return static_cast<int>(region->second.index);
}

}  // namespace spillover
