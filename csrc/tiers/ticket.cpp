#include "tiers/ticket.hpp"

#include <utility>

#include "base/check.hpp"
#include "base/error.hpp"
#include "trace/span.hpp"

namespace spillover {
namespace {

constexpr TraceLabel kWait{"wait for the disk", "stall"};

}  // namespace

void Ticket::wait_for_pieces(std::unique_lock<std::mutex>& lock) const {
  if (pieces_left_ == 0) return;
  const TraceSpan span(kWait);
  const int64_t begin_ns = trace_now_ns();
  done_.wait(lock, [&] { return pieces_left_ == 0; });
  if (waits_ != nullptr) waits_->add(trace_now_ns() - begin_ns);
}

void Ticket::check_owner() const {
  if (getpid() == owner_) return;
  throw StateError("a forked child cannot wait for the disk requests of its parent");
}

bool Ticket::is_done() const {
  check_owner();
  std::unique_lock lock(mutex_, std::defer_lock);
  if (work_.empty()) {
    lock.lock();
    return pieces_left_ == 0;
  }
  // Where time is virtual it alone decides, however fast the disk is.
  for (const WorkId work : work_) {
    if (!annotate_work_is_done(work)) return false;
  }
  lock.lock();
  wait_for_pieces(lock);
  return true;
}

void Ticket::wait() const {
  check_owner();
  wait_quietly();
  const std::lock_guard lock(mutex_);
  if (first_error_) std::rethrow_exception(first_error_);
}

void Ticket::wait_quietly() const noexcept {
  if (getpid() != owner_) return;
  {
    std::unique_lock lock(mutex_);
    wait_for_pieces(lock);
  }
  for (const WorkId work : work_) annotate_work_wait(work);
}

void Ticket::finish_piece(std::exception_ptr error) noexcept {
  const std::lock_guard lock(mutex_);
  SPILLOVER_CHECK(pieces_left_ > 0, "a disk request finished more pieces than it has");
  if (error && !first_error_) first_error_ = std::move(error);
  if (--pieces_left_ == 0) done_.notify_all();
}

}  // namespace spillover
