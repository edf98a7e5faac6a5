// Writes that wait for the device before a disk engine may have them.
//
// Note [Gates]. A gate waits for a CUDA event, which may be far away, or hang with its stream. The
// engines must not wait for it: it would hold up whatever else their disk has to do. So gates have
// threads of their own, which start when they are needed; a write goes to its engines when its gate
// has opened. Reads and writes without a gate never wait for one, and other gated writes do only
// once kThreadsMax gates are stuck.
//
// add() may be called from any thread, close() by one at a time. PRIVATE to tiers/.
#pragma once

#include <cstddef>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "base/bounded_queue.hpp"
#include "tiers/disk_engine.hpp"

namespace spillover {

class WriteGates {
 public:
  static constexpr size_t kThreadsMax = 4;

  struct Write {
    std::function<void()> gate;
    std::vector<DiskPiece> pieces;
  };
  // Gets each piece, with what its gate threw, or null. Does not throw.
  using Release = std::function<void(DiskPiece&&, std::exception_ptr)>;

  WriteGates(size_t queue_length_max, Release release)
      : queue_(queue_length_max), release_(std::move(release)) {}
  ~WriteGates() { close(); }
  WriteGates(const WriteGates&) = delete;
  WriteGates& operator=(const WriteGates&) = delete;

  // Blocks while the queue is full. False, and the write untouched, once closed; so it is where
  // this throws, for want of a thread.
  bool add(Write&& write);

  // Refuses new writes, releases those it has when their gates have opened, and ends the threads.
  void close() noexcept;

 private:
  void start_thread_if_needed();
  void serve() noexcept;
  void pass(Write& write) noexcept;

  BoundedQueue<Write> queue_;
  const Release release_;
  std::mutex mutex_;
  // Guarded by mutex_.
  size_t waiting_ = 0;  // Writes in the queue or at their gate.
  bool is_closed_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace spillover
