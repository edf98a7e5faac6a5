#include "transfer/transfer_ticket.hpp"

#include <utility>

#include "base/check.hpp"
#include "base/error.hpp"
#include "driver/context.hpp"
#include "driver/fork_guard.hpp"
#include "driver/stream.hpp"

namespace spillover {

bool TransferTicket::is_done() const {
  check_not_forked();
  std::unique_lock lock(mutex_);
  while (pieces_left_ > 0) {
    bool is_timed = false;
    const std::vector<std::shared_ptr<Ticket>> reads = reads_;
    lock.unlock();
    for (const auto& read : reads) {
      if (!read->is_done()) return false;
      is_timed = is_timed || read->is_timed();
    }
    if (!is_timed) return false;
    // Where time is virtual it alone decides: by now the pieces would have been issued.
    lock.lock();
    changed_.wait(lock, [&] { return pieces_left_ == 0 || reads_.size() != reads.size(); });
  }
  const std::shared_ptr<CopyMark> last = last_;
  lock.unlock();
  return last == nullptr || last->poll();
}

// Its mark, or null.
std::shared_ptr<CopyMark> TransferTicket::wait_until_issued() const {
  check_not_forked();
  std::unique_lock lock(mutex_);
  if (pieces_left_ > 0) {
    const Stall stall(*counters_, StallCause::kDisk);
    changed_.wait(lock, [&] { return pieces_left_ == 0; });
  }
  const std::shared_ptr<CopyMark> last = last_;
  const std::vector<std::shared_ptr<Ticket>> reads = reads_;
  lock.unlock();
  // Where time is virtual, the calling thread goes on when the last read would have been over.
  for (const auto& read : reads) read->wait_quietly();
  return last;
}

// Called with the mutex held. Only virtual time asks again for reads whose pieces are issued.
void TransferTicket::forget_reads() noexcept {
  if (pieces_left_ == 0) std::erase_if(reads_, [](const auto& read) { return !read->is_timed(); });
}

void TransferTicket::throw_error() const {
  const std::lock_guard lock(mutex_);
  if (is_cancelled_) throw StateError("the transfer was cancelled");
  if (error_) std::rethrow_exception(error_);
}

void TransferTicket::wait() const {
  const std::shared_ptr<CopyMark> last = wait_until_issued();
  if (last != nullptr && !last->poll()) {
    const Stall stall(*counters_, StallCause::kCopy);
    last->wait();
    last->poll();
  }
  throw_error();
}

void TransferTicket::wait_detached() const {
  check_not_forked();
  std::shared_ptr<CopyMark> last;
  {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return pieces_left_ == 0; });
    last = last_;
  }
  if (last != nullptr) last->wait();
  throw_error();
}

void TransferTicket::put_before(StreamHandle stream) const {
  const std::shared_ptr<CopyMark> last = wait_until_issued();
  throw_error();
  if (last == nullptr) return;
  const ContextScope scope(last->event().device());
  if (stream_is_capturing(stream)) {
    throw StateError(
        "a stream that records a CUDA graph cannot wait for a transfer; wait before the capture");
  }
  if (!last->is_known_passed()) last->event().put_before(stream);
}

bool TransferTicket::is_cancelled() const {
  check_not_forked();
  const std::lock_guard lock(mutex_);
  return is_cancelled_;
}

void TransferTicket::issued(size_t pieces, std::shared_ptr<CopyMark> mark) noexcept {
  const std::lock_guard lock(mutex_);
  SPILLOVER_CHECK(pieces <= pieces_left_, "a transfer has issued more pieces than it has");
  pieces_left_ -= pieces;
  last_ = std::move(mark);
  forget_reads();
  changed_.notify_all();
}

void TransferTicket::reads(std::shared_ptr<Ticket> read) noexcept {
  const std::lock_guard lock(mutex_);
  if (pieces_left_ > 0) reads_.push_back(std::move(read));
  changed_.notify_all();
}

void TransferTicket::fail(size_t pieces, std::exception_ptr error) noexcept {
  const std::lock_guard lock(mutex_);
  SPILLOVER_CHECK(pieces <= pieces_left_, "a transfer has lost more pieces than it has");
  pieces_left_ -= pieces;
  if (!error_) error_ = std::move(error);
  forget_reads();
  changed_.notify_all();
}

bool TransferTicket::cancel() noexcept {
  const std::lock_guard lock(mutex_);
  if (is_cancelled_ || error_ ||
      (pieces_left_ == 0 && (last_ == nullptr || last_->is_known_passed())))
    return false;
  is_cancelled_ = true;
  return true;
}

}  // namespace spillover
