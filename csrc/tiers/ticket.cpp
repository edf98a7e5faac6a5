#include "tiers/ticket.hpp"

#include <utility>

#include "base/check.hpp"

namespace spillover {

bool Ticket::is_done() const {
  const std::lock_guard lock(mutex_);
  return pieces_left_ == 0;
}

void Ticket::wait() const {
  std::unique_lock lock(mutex_);
  done_.wait(lock, [&] { return pieces_left_ == 0; });
  if (first_error_) std::rethrow_exception(first_error_);
}

void Ticket::wait_quietly() const noexcept {
  std::unique_lock lock(mutex_);
  done_.wait(lock, [&] { return pieces_left_ == 0; });
}

void Ticket::finish_piece(std::exception_ptr error) noexcept {
  const std::lock_guard lock(mutex_);
  SPILLOVER_CHECK(pieces_left_ > 0, "a disk request finished more pieces than it has");
  if (error && !first_error_) first_error_ = std::move(error);
  if (--pieces_left_ == 0) done_.notify_all();
}

}  // namespace spillover
