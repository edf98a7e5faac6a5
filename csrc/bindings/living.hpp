// The pools and stores of the process, for statistics. PRIVATE to bindings/.
#pragma once

#include <unistd.h>

#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace spillover {

// Every pool and store of this process that Python has made and that is alive, for statistics.
template <class Object>
class Living {
 public:
  std::shared_ptr<Object> add(std::shared_ptr<Object> object) {
    const std::lock_guard lock(mutex_);
    std::erase_if(known_, [](const Known& one) { return one.object.expired(); });
    known_.push_back({object, getpid()});
    return object;
  }

  // Not those of a parent: one of its threads may have held their locks at the fork.
  std::vector<std::shared_ptr<Object>> all() {
    std::vector<std::shared_ptr<Object>> found;
    const std::lock_guard lock(mutex_);
    for (const Known& one : known_) {
      if (one.process != getpid()) continue;
      if (auto object = one.object.lock()) found.push_back(std::move(object));
    }
    return found;
  }

 private:
  struct Known {
    std::weak_ptr<Object> object;
    pid_t process;
  };
  std::mutex mutex_;
  std::vector<Known> known_;  // Guarded by mutex_.
};

// Leaked on purpose: Python may drop objects while static destructors run. Both are used with the
// GIL held, so that no fork of Python's finds the mutex locked.
template <class Object>
Living<Object>& living() {
  static auto& objects = *new Living<Object>;
  return objects;
}

}  // namespace spillover
