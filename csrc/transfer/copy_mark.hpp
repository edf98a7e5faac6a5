// Marks on the copy streams: where a batch of copies ends.
//
// A CopyMark is shared by everybody who waits for it. Methods may be called from any thread, with
// no lock held: they call the driver. The events are kept and used again, since making one costs as
// much as a small copy.
#pragma once

#include <atomic>
#include <cstddef>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "driver/event.hpp"

namespace spillover {

class CopyMark {
 public:
  explicit CopyMark(Event event) : event_(std::move(event)) {}
  CopyMark(const CopyMark&) = delete;
  CopyMark& operator=(const CopyMark&) = delete;

  const Event& event() const { return event_; }

  // Whether somebody has found it passed; no call of the driver.
  bool is_known_passed() const { return is_passed_.load(std::memory_order_acquire); }

  // Whether the copies are over. Does not block; false where the driver refuses to say.
  bool poll() noexcept;

  // The same for threads that have no time of their own (the disk's, the engine's): what they find
  // stays unknown to the others, whose time may be earlier where time is virtual.
  bool peek() const noexcept;

  // Blocks the host, and asks the driver even where the mark is known to be passed: where time is
  // virtual, the work of the thread that waits depends on it. Throws DriverError.
  void wait() const;

  // Blocks the host, whatever the driver says.
  void settle() noexcept;

 private:
  friend class CopyMarks;

  Event event_;  // Constant once recorded.
  std::atomic<bool> is_passed_{false};
};

// Makes marks for one device. Thread-safe; shared by its marks.
class CopyMarks : public std::enable_shared_from_this<CopyMarks> {
 public:
  static constexpr size_t kSpareMax = 256;

  explicit CopyMarks(int device) : device_(device) {}

  // A mark at the end of what is on the stream now, which does not capture. Throws DriverError.
  std::shared_ptr<CopyMark> record(StreamHandle stream);

 private:
  Event take_event();
  void give_back(Event event) noexcept;

  const int device_;
  std::mutex mutex_;
  std::vector<Event> spare_;  // Guarded by mutex_.
};

}  // namespace spillover
