#include "tiers/write_gates.hpp"

#include <pthread.h>

#include <utility>

#include "tiers/work_annotation.hpp"

namespace spillover {

bool WriteGates::add(Write&& write) {
  start_thread_if_needed();
  if (queue_.push(std::move(write))) return true;
  const std::lock_guard lock(mutex_);
  --waiting_;
  return false;
}

void WriteGates::start_thread_if_needed() {
  const std::lock_guard lock(mutex_);
  if (!is_closed_ && waiting_ >= threads_.size() && threads_.size() < kThreadsMax) {
    try {
      threads_.emplace_back([this] { serve(); });
    } catch (...) {
      if (threads_.empty()) throw;  // Otherwise the others will come to it.
    }
  }
  ++waiting_;
}

void WriteGates::close() noexcept {
  queue_.close();
  std::vector<std::thread> threads;
  {
    const std::lock_guard lock(mutex_);
    is_closed_ = true;
    threads.swap(threads_);
  }
  for (std::thread& thread : threads) thread.join();
}

void WriteGates::serve() noexcept {
  pthread_setname_np(pthread_self(), "spillover-gate");
  while (auto write = queue_.pop()) {
    pass(*write);
    const std::lock_guard lock(mutex_);
    --waiting_;
  }
}

void WriteGates::pass(Write& write) noexcept {
  for (DiskPiece& piece : write.pieces) {
    std::exception_ptr error;
    try {
      // Once for each piece: the virtual clock ties what is waited for to one piece of work. When
      // the gate has opened it costs next to nothing to ask again.
      annotate_work_waits(piece.work);
      write.gate();
    } catch (...) {
      error = std::current_exception();
    }
    release_(std::move(piece), std::move(error));
  }
}

}  // namespace spillover
