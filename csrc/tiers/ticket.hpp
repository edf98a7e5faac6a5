// The completion of a disk request, which may consist of several pieces.
//
// Thread-safe. Shared by the requester and the I/O threads. A forked child has neither threads nor,
// for what it knows, a lock that is free: there nothing waits, and asking throws StateError.
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "tiers/work_annotation.hpp"

namespace spillover {

struct WaitStats {
  uint64_t count;
  double seconds;  // Summed over threads.
};

// Host threads that waited for requests. Thread-safe.
class WaitCounters {
 public:
  void add(int64_t nanoseconds) noexcept {
    ++count_;
    nanoseconds_ += nanoseconds;
  }
  WaitStats stats() const { return {count_, static_cast<double>(nanoseconds_) / 1e9}; }

 private:
  std::atomic<uint64_t> count_{0};
  std::atomic<int64_t> nanoseconds_{0};
};

class Ticket {
 public:
  // Waits for it are counted there, unless it is null.
  explicit Ticket(size_t piece_count, std::shared_ptr<WaitCounters> waits = nullptr)
      : waits_(std::move(waits)), pieces_left_(piece_count) {}

  // For the store, before anybody else has the ticket: what the virtual clock knows of the request.
  void add_work(WorkId work) {
    if (work != 0) work_.push_back(work);
  }

  // Whether the request is over, well or not. Does not block and does not throw the request's
  // error.
  bool is_done() const;

  // Blocks until the request is over. Throws its first error, at each call.
  void wait() const;

  // The same without throwing, for those who only need the memory back.
  void wait_quietly() const noexcept;

  // For the store: a piece is over; error is null where it went well.
  void finish_piece(std::exception_ptr error) noexcept;

 private:
  void check_owner() const;
  void wait_for_pieces(std::unique_lock<std::mutex>& lock) const;

  const pid_t owner_ = getpid();
  const std::shared_ptr<WaitCounters> waits_;
  std::vector<WorkId> work_;  // constant once the request has been made
  mutable std::mutex mutex_;
  mutable std::condition_variable done_;
  // Guarded by mutex_.
  size_t pieces_left_;
  std::exception_ptr first_error_;
};

}  // namespace spillover
