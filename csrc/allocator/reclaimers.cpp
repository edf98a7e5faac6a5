#include "allocator/reclaimers.hpp"

#include <algorithm>
#include <utility>

namespace spillover {
namespace {

// The entry of the reclaimer that the thread is in, of whichever pool; null outside.
thread_local const void* t_running = nullptr;

}  // namespace

std::shared_ptr<Reclaimers::Entry> Reclaimers::find(uint64_t number) const {
  const auto entry = std::find_if(entries_.begin(), entries_.end(), [&](const auto& candidate) {
    return candidate->number == number;
  });
  return entry == entries_.end() ? nullptr : *entry;
}

uint64_t Reclaimers::add(Reclaim reclaim) {
  const std::lock_guard lock(mutex_);
  entries_.push_back(std::make_shared<Entry>(Entry{++latest_number_, std::move(reclaim)}));
  return latest_number_;
}

bool Reclaimers::remove(uint64_t number) {
  std::shared_ptr<Entry> entry;  // Ends after the lock: what it holds may call the pool, or wait.
  std::unique_lock lock(mutex_);
  entry = find(number);
  if (entry == nullptr) return false;
  std::erase(entries_, entry);
  const size_t own_calls = t_running == entry.get() ? 1 : 0;
  call_ended_.wait(lock, [&] { return entry->call_count <= own_calls; });
  return true;
}

std::vector<uint64_t> Reclaimers::numbers() const {
  std::vector<uint64_t> result;
  if (t_running != nullptr) return result;
  const std::lock_guard lock(mutex_);
  for (const auto& entry : entries_) result.push_back(entry->number);
  return result;
}

size_t Reclaimers::call(uint64_t number, size_t missing_bytes, StreamHandle stream) noexcept {
  std::shared_ptr<Entry> entry;
  {
    const std::lock_guard lock(mutex_);
    entry = find(number);
    if (entry == nullptr) return 0;
    ++entry->call_count;
  }
  t_running = entry.get();
  const size_t freed_bytes = entry->reclaim(missing_bytes, stream);
  t_running = nullptr;
  {
    const std::lock_guard lock(mutex_);
    --entry->call_count;
  }
  call_ended_.notify_all();
  return freed_bytes;
}

}  // namespace spillover
