#include "tiers/thread_engine.hpp"

#include <pthread.h>

#include <exception>
#include <optional>
#include <utility>

#include "trace/recorder.hpp"

namespace spillover {

ThreadEngine::ThreadEngine(const BlockFile& file, DiskPieceOwner& owner, size_t thread_count,
                           size_t queue_length_max)
    : file_(file), owner_(owner), queue_(queue_length_max) {
  try {
    for (size_t i = 0; i < thread_count; ++i) threads_.emplace_back([this] { serve(); });
  } catch (...) {
    close();
    throw;
  }
}

void ThreadEngine::close() noexcept {
  queue_.close();
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

void ThreadEngine::serve() noexcept {
  pthread_setname_np(pthread_self(), "spillover-disk");
  std::optional<ExtentIo> io;
  while (auto piece = queue_.pop()) {
    std::exception_ptr error;
    piece->notes.begun_ns = trace_now_ns();
    try {
      if (!io) io.emplace();
      if (piece->direction == TransferDirection::kRead) {
        io->read(file_, piece->extent, piece->data, piece->notes);
      } else {
        piece->extent.crc32c = io->write(file_, piece->extent, piece->data, piece->notes);
      }
    } catch (...) {
      error = std::current_exception();
    }
    owner_.finish(*piece, std::move(error));
  }
}

}  // namespace spillover
