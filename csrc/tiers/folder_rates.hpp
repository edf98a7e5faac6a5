// How fast each folder of a disk store is, and whose turn it is to take the next extent.
//
// Note [Striping]. Extents go to the folders in proportion to their throughput, so that all disks
// are done with a payload at the same time. A sample of throughput is bytes over time while the
// folder had something to do, of at most kSampleBytes; an exponential moving average of them
// counts, which forgets as the store as a whole moves on, by kMemoryBytes. All folders start as
// equals and become themselves over their first kPriorBytes. None gets less than a small share, or
// nobody would see that it has become fast again.
//
// Thread-safe; the mutex is a leaf, held over nothing that waits.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

namespace spillover {

class FolderRates {
 public:
  static constexpr double kMemoryBytes = 64 << 20;
  static constexpr double kPriorBytes = 8 << 20;
  static constexpr double kKnownMax = 0.95;  // Of a folder's own rate; the rest is the mean.
  static constexpr double kSampleBytes = 2 << 20;
  static constexpr double kShareMin = 1.0 / 32;  // Of the fastest folder's.

  using Clock = std::chrono::steady_clock;

  explicit FolderRates(size_t folder_count) : folders_(folder_count) {}

  // Around what an engine has to do.
  void begin(size_t folder, Clock::time_point now) noexcept;
  void end(size_t folder, size_t moved_bytes, Clock::time_point now) noexcept;

  // All folders, the one whose turn it is first.
  std::vector<size_t> order() const;
  // The folder has taken an extent.
  void charge(size_t folder, size_t size_bytes);

  // Bytes a second of each, as measured; 0 for one that has moved nothing.
  std::vector<double> bandwidths() const;

 private:
  struct Folder {
    size_t running = 0;
    Clock::time_point sample_since;
    double sample_bytes = 0;
    double rate_bytes_s = 0;  // The average; 0 before the first sample.
    double seen_bytes = 0;    // Ever.
    double total_bytes = 0;   // Of all folders, at the last sample.
    double turn = 0;          // Seconds that its extents will take; the least is next.
  };

  void sample(Folder& one, Clock::time_point now) noexcept;
  std::vector<double> weights() const;

  mutable std::mutex mutex_;
  // Guarded by mutex_.
  std::vector<Folder> folders_;
  double total_bytes_ = 0;
};

}  // namespace spillover
