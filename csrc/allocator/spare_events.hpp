// Events that the pool uses again and again: making one costs a driver call and takes its locks.
//
// Owned by one Pool and guarded by its mutex.
#pragma once

#include <utility>
#include <vector>

#include "driver/event.hpp"

namespace spillover {

class SpareEvents {
 public:
  explicit SpareEvents(int device) : device_(device) {}

  // Throws DriverError where the driver makes no event.
  Event take() {
    if (events_.empty()) return Event(device_);
    Event event = std::move(events_.back());
    events_.pop_back();
    return event;
  }

  // The mark of the event may be pending: recording it again moves the mark.
  void give(Event event) { events_.push_back(std::move(event)); }

  // Gives them to the driver.
  void release() noexcept { events_.clear(); }

 private:
  const int device_;
  std::vector<Event> events_;
};

}  // namespace spillover
