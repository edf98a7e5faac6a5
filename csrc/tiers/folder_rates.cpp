#include "tiers/folder_rates.hpp"

#include <algorithm>
#include <numeric>
#include <utility>

namespace spillover {
namespace {

// How far a folder that had no room may fall behind; else it would get all extents for long.
constexpr double kLagBytesMax = 64 << 20;

}  // namespace

void FolderRates::begin(size_t folder, Clock::time_point now) noexcept {
  const std::lock_guard lock(mutex_);
  Folder& one = folders_[folder];
  if (one.running++ > 0) return;
  one.sample_since = now;
  one.sample_bytes = 0;
}

void FolderRates::end(size_t folder, size_t moved_bytes, Clock::time_point now) noexcept {
  const std::lock_guard lock(mutex_);
  Folder& one = folders_[folder];
  --one.running;
  const auto bytes = static_cast<double>(moved_bytes);
  total_bytes_ += bytes;
  one.sample_bytes += bytes;
  if (one.running == 0 || one.sample_bytes >= kSampleBytes) sample(one, now);
}

// The caller holds the mutex.
void FolderRates::sample(Folder& one, Clock::time_point now) noexcept {
  const double busy_s = std::chrono::duration<double>(now - one.sample_since).count();
  const double bytes = std::exchange(one.sample_bytes, 0);
  one.sample_since = now;
  if (bytes == 0 || busy_s <= 0) return;  // Failures say nothing of throughput.
  const double passed_bytes = total_bytes_ - std::exchange(one.total_bytes, total_bytes_);
  const double weight = one.rate_bytes_s > 0 ? std::min(1.0, passed_bytes / kMemoryBytes) : 1;
  one.rate_bytes_s += weight * (bytes / busy_s - one.rate_bytes_s);
  one.seen_bytes += bytes;
}

// Bytes a second, as far as they are known. The caller holds the mutex.
std::vector<double> FolderRates::weights() const {
  double sum = 0;
  double count = 0;
  for (const Folder& folder : folders_) {
    sum += folder.rate_bytes_s;
    count += folder.rate_bytes_s > 0 ? 1 : 0;
  }
  std::vector<double> weights(folders_.size(), 1.0);
  if (count == 0) return weights;
  for (size_t i = 0; i < folders_.size(); ++i) {
    const double known = std::min(kKnownMax, folders_[i].seen_bytes / kPriorBytes);
    weights[i] = known * folders_[i].rate_bytes_s + (1 - known) * sum / count;
  }
  const double least = *std::max_element(weights.begin(), weights.end()) * kShareMin;
  for (double& weight : weights) weight = std::max(weight, least);
  return weights;
}

std::vector<size_t> FolderRates::order() const {
  std::vector<size_t> order(folders_.size());
  std::iota(order.begin(), order.end(), size_t{0});
  const std::lock_guard lock(mutex_);
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return folders_[a].turn < folders_[b].turn; });
  return order;
}

void FolderRates::charge(size_t folder, size_t size_bytes) {
  const std::lock_guard lock(mutex_);
  const std::vector<double> weight = weights();
  folders_[folder].turn += static_cast<double>(size_bytes) / weight[folder];
  double latest = 0;
  for (const Folder& one : folders_) latest = std::max(latest, one.turn);
  for (size_t i = 0; i < folders_.size(); ++i) {
    folders_[i].turn = std::max(folders_[i].turn, latest - kLagBytesMax / weight[i]);
    folders_[i].turn -= latest;  // Small numbers stay exact.
  }
}

std::vector<double> FolderRates::bandwidths() const {
  const std::lock_guard lock(mutex_);
  std::vector<double> found;
  found.reserve(folders_.size());
  for (const Folder& folder : folders_) {
    found.push_back(folder.rate_bytes_s);
  }
  return found;
}

}  // namespace spillover
