// A mutex that the emulated device's hazard checker sees.
//
// Who locks it knows what everyone knew who unlocked it before: that a stream was waited for, for
// example. The checker sees Python's locks by itself, not those of C++. On a real driver the
// annotation costs two relaxed loads.
#pragma once

#include <mutex>

namespace spillover {

class AnnotatedMutex {
 public:
  void lock() {
    mutex_.lock();
    acquired();
  }
  bool try_lock() {
    if (!mutex_.try_lock()) return false;
    acquired();
    return true;
  }
  void unlock() {
    about_to_release();
    mutex_.unlock();
  }

 private:
  void acquired() noexcept;
  void about_to_release() noexcept;

  std::mutex mutex_;
};

}  // namespace spillover
