#include "base/unshared_file.hpp"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <mutex>
#include <vector>

#include "base/fork_generation.hpp"

namespace spillover {
namespace {

// Held over each fork, so that a child has no descriptor that is not listed, and none is listed
// that has become another file's.
struct Unshared {
  std::mutex mutex;
  std::vector<int> numbers;
};

Unshared& unshared() {
  // Leaked on purpose: forks happen after static destructors, too.
  static auto& files = *new Unshared;
  return files;
}

void lock_at_fork() {
  unshared().mutex.lock();
}

void unlock_at_fork() {
  unshared().mutex.unlock();
}

// Only what signal handlers may do.
void close_in_child() {
  const int native_error = errno;
  for (const int number : unshared().numbers) ::close(number);
  unshared().numbers.clear();
  unshared().mutex.unlock();
  errno = native_error;
}

}  // namespace

UnsharedFile::UnsharedFile(const std::function<int()>& open) {
  static const int watched = pthread_atfork(lock_at_fork, unlock_at_fork, close_in_child);
  static_cast<void>(watched);
  generation_ = fork_generation();
  Unshared& files = unshared();
  const std::lock_guard lock(files.mutex);
  files.numbers.reserve(files.numbers.size() + 1);
  number_ = std::max(-1, open());
  if (is_open()) files.numbers.push_back(number_);
}

void UnsharedFile::reset() noexcept {
  const int number = std::exchange(number_, -1);
  // In a child it was closed already, and may be the number of another file by now.
  if (number < 0 || generation_ != fork_generation()) return;
  Unshared& files = unshared();
  const std::lock_guard lock(files.mutex);
  std::erase(files.numbers, number);
  ::close(number);
}

}  // namespace spillover
