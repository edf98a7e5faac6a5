// The completion of a transfer between the device and the engine.
//
// A transfer consists of pieces, each of which is *issued* (put on a copy stream) at once, or once
// its bytes have come from the disk. It is over when all pieces are issued and the last one's mark
// has passed, or when a piece failed and no other is on its way. Thread-safe; no method may be
// called with a lock held, as they wait for the device. A forked child gets StateError.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <vector>

#include "driver/types.hpp"
#include "tiers/ticket.hpp"
#include "transfer/copy_mark.hpp"
#include "transfer/transfer_stats.hpp"

namespace spillover {

class TransferTicket {
 public:
  TransferTicket(std::shared_ptr<TransferCounters> counters, size_t pieces)
      : counters_(std::move(counters)), pieces_left_(pieces) {}

  // Whether the transfer is over, well or not. Does not block, and does not throw its error.
  bool is_done() const;

  // Blocks until the transfer is over. Throws its first error at each call; StateError where it was
  // cancelled.
  void wait() const;

  // wait() for a thread that has no time of its own, such as a disk's: what it finds stays unknown
  // to others, as with CopyMark::peek().
  void wait_detached() const;

  // Has what is put on the stream from now on wait for the transfer. Blocks the host until all
  // pieces are issued, and throws like wait() where one failed. The stream does not capture.
  void put_before(StreamHandle stream) const;

  bool is_cancelled() const;

  // ---- for the engine ----

  // So many pieces were issued; mark is behind the last of them. Pieces of one ticket are issued by
  // one thread at a time, on one stream.
  void issued(size_t pieces, std::shared_ptr<CopyMark> mark) noexcept;
  // A piece waits for this request.
  void reads(std::shared_ptr<Ticket> read) noexcept;
  // So many pieces will not be issued.
  void fail(size_t pieces, std::exception_ptr error) noexcept;
  // False where the transfer was over, or cancelled, before. Pieces are still to be accounted for.
  bool cancel() noexcept;

 private:
  std::shared_ptr<CopyMark> wait_until_issued() const;
  void forget_reads() noexcept;
  void throw_error() const;

  const std::shared_ptr<TransferCounters> counters_;
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  // Guarded by mutex_.
  size_t pieces_left_;
  std::shared_ptr<CopyMark> last_;
  std::vector<std::shared_ptr<Ticket>> reads_;
  std::exception_ptr error_;
  bool is_cancelled_ = false;
};

}  // namespace spillover
