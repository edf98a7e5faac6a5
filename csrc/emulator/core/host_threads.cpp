#include "emulator/core/host_threads.hpp"

namespace spillover::emulator {

struct HostThreads::Thread {
  Knowledge knowledge;
  std::uint64_t shared_seen = 0;
};

namespace {

// Plain data, so that it can be used while the thread ends.
thread_local bool is_followed = false;
thread_local void* followed_thread = nullptr;

}  // namespace

HostThreads::Thread* HostThreads::this_thread() {
  if (!is_followed) return nullptr;
  if (followed_thread == nullptr) {
    auto* const thread = new Thread;
    thread->knowledge.version = next_version_++;
    followed_thread = thread;
  }
  return static_cast<Thread*>(followed_thread);
}

bool HostThreads::merge(Knowledge* into, const VectorClock& clock, std::uint64_t* next_version) {
  if (!into->clock.merge(clock)) return false;
  into->version = (*next_version)++;
  return true;
}

const HostThreads::Knowledge& HostThreads::current() {
  Thread* const thread = this_thread();
  if (thread == nullptr) {
    if (shared_.version != everyone_.version) {
      shared_.clock.merge(everyone_.clock);
      shared_.version = everyone_.version;
    }
    return shared_;
  }
  if (thread->shared_seen != shared_.version) {
    thread->shared_seen = shared_.version;
    merge(&thread->knowledge, shared_.clock, &next_version_);
  }
  return thread->knowledge;
}

std::shared_ptr<const VectorClock> HostThreads::snapshot() {
  const Knowledge& known = current();
  if (snapshot_ == nullptr || snapshot_version_ != known.version) {
    snapshot_ = std::make_shared<const VectorClock>(known.clock);
    snapshot_version_ = known.version;
  }
  return snapshot_;
}

void HostThreads::learn(const VectorClock& clock) {
  Thread* const thread = this_thread();
  if (thread == nullptr) return learn_for_all(clock);
  merge(&thread->knowledge, clock, &next_version_);
  merge(&everyone_, clock, &next_version_);
}

void HostThreads::learn_for_all(const VectorClock& clock) {
  merge(&everyone_, clock, &next_version_);
  merge(&shared_, clock, &next_version_);
}

void HostThreads::begin() {
  is_followed = true;
}

void HostThreads::end() {
  delete static_cast<Thread*>(followed_thread);
  followed_thread = nullptr;
  is_followed = false;
}

void HostThreads::release(std::uint64_t token) {
  released_[token].merge(current().clock);
}

void HostThreads::acquire(std::uint64_t token) {
  const auto known = released_.find(token);
  if (known != released_.end()) learn(known->second);
}

}  // namespace spillover::emulator
