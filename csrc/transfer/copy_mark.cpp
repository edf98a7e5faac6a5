#include "transfer/copy_mark.hpp"

#include <exception>
#include <utility>

#include "driver/context.hpp"
#include "driver/device.hpp"
#include "driver/fork_guard.hpp"

namespace spillover {

bool CopyMark::poll() noexcept {
  if (is_known_passed()) return true;
  if (!peek()) return false;
  is_passed_.store(true, std::memory_order_release);
  return true;
}

// Questions and waits are relaxed: by default they would end a capture that is going on elsewhere.
bool CopyMark::peek() const noexcept {
  try {
    const RelaxedCaptureScope relaxed;
    return event_.is_complete();
  } catch (const std::exception&) {
    return false;  // Whoever waits for the copy gets the error.
  }
}

void CopyMark::wait() const {
  const RelaxedCaptureScope relaxed;
  event_.synchronize();
}

void CopyMark::settle() noexcept {
  // The first attempt may return an error of earlier work.
  for (int attempt = 0; attempt < 2; ++attempt) {
    try {
      wait();
      is_passed_.store(true, std::memory_order_release);
      return;
    } catch (const std::exception&) {
      continue;
    }
  }
  synchronize_device_for_release(event_.device());
  is_passed_.store(true, std::memory_order_release);
}

std::shared_ptr<CopyMark> CopyMarks::record(StreamHandle stream) {
  auto made = std::make_unique<CopyMark>(take_event());
  made->event_.record(stream);
  return {made.release(), [marks = shared_from_this()](CopyMark* mark) {
            marks->give_back(std::move(mark->event_));
            delete mark;
          }};
}

Event CopyMarks::take_event() {
  {
    const std::lock_guard lock(mutex_);
    if (!spare_.empty()) {
      Event event = std::move(spare_.back());
      spare_.pop_back();
      return event;
    }
  }
  // Who waits may be a thread of the disk's, which must not burn a core.
  return Event(device_, EventWait::kSleep);
}

// The mark may be ahead: recording the event anew does not disturb those who wait for the old one.
void CopyMarks::give_back(Event event) noexcept {
  if (in_forked_child()) return;
  const std::lock_guard lock(mutex_);
  if (spare_.size() < kSpareMax) spare_.push_back(std::move(event));
}

}  // namespace spillover
