// What a pool asks for memory before it gives up: functions of others that can free some.
//
// Note [Reclaimers]. A reclaimer is called by the thread whose request cannot be served, with no
// lock of the pool held, and gets the bytes that are missing. It frees blocks of the pool, on any
// thread and stream, and returns about how many bytes they have; 0 when it has nothing more to
// give. It may allocate, but its own requests do not reclaim again. Several threads may call it at
// once. The pool itself looks what has become free: a wrong number costs time and nothing else.
//
// Thread-safe.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "driver/types.hpp"

namespace spillover {

class Reclaimers {
 public:
  // What it throws stops the process.
  using Reclaim = std::function<size_t(size_t missing_bytes, StreamHandle stream)>;

  // Called after those that were added before. Gives a number for remove(), never 0.
  uint64_t add(Reclaim reclaim);

  // When this returns the reclaimer does not run and will not be called again; but a reclaimer that
  // removes itself still ends its call. False where it was removed before.
  bool remove(uint64_t number);

  // The reclaimers of now, for a thread that calls them one after the other; none within a
  // reclaimer.
  std::vector<uint64_t> numbers() const;

  // Calls one; 0 where it was removed meanwhile.
  size_t call(uint64_t number, size_t missing_bytes, StreamHandle stream) noexcept;

 private:
  struct Entry {
    uint64_t number;
    Reclaim reclaim;
    size_t call_count = 0;  // that run now
  };

  std::shared_ptr<Entry> find(uint64_t number) const;

  mutable std::mutex mutex_;
  std::condition_variable call_ended_;
  // Guarded by mutex_, and so is each call_count.
  std::vector<std::shared_ptr<Entry>> entries_;
  uint64_t latest_number_ = 0;
};

}  // namespace spillover
