// Events that the pool uses again and again: making one costs a driver call and takes its locks.
//
// Owned by one Pool and guarded by its mutex.
#pragma once

#include <map>
#include <utility>
#include <vector>

#include "driver/event.hpp"

namespace spillover {

class SpareEvents {
 public:
  // Throws DriverError where the driver makes no event.
  Event take(int device) {
    std::vector<Event>& events = events_[device];
    if (events.empty()) return Event(device);
    Event event = std::move(events.back());
    events.pop_back();
    return event;
  }

  // The mark of the event may be pending: recording it again moves the mark.
  void give(Event event) { events_[event.device()].push_back(std::move(event)); }

  // Gives them to the driver.
  void release() noexcept { events_.clear(); }

 private:
  std::map<int, std::vector<Event>> events_;  // By device.
};

}  // namespace spillover
