// Where the memory of a private arena comes from, if not from the driver: another allocator's
// functions, as a torch.cuda.MemPool may bring them.
//
// Shared by the arena and by each chunk that came from it, so that it lives until the last of them
// has gone back. Its functions are called by any thread, without a lock of the pool, and may call
// the pool.
#pragma once

#include <atomic>
#include <cstddef>
#include <functional>
#include <memory>
#include <optional>

#include "driver/types.hpp"

namespace spillover {

struct Upstream {
  Upstream() = default;
  ~Upstream();
  Upstream(const Upstream&) = delete;
  Upstream& operator=(const Upstream&) = delete;

  // Whether the calling thread is in a function of some upstream.
  static bool is_running();

  // Null where it has not that much. Must not throw.
  std::function<void*(size_t size_bytes, StreamHandle stream)> allocate;
  // The work on the memory is complete. Must not throw.
  std::function<void(void* pointer, size_t size_bytes)> free;
  // Called at the end, may be empty. Must not throw.
  std::function<void()> done;
  // What is asked for in addition, once an address was no multiple of kBlockAlignment.
  mutable std::atomic<size_t> padding_bytes = 0;
};

// Memory from an upstream. Move-only; goes back there.
class UpstreamMemory {
 public:
  // At a multiple of kBlockAlignment. Empty where the upstream has not that much.
  static std::optional<UpstreamMemory> try_allocate(const std::shared_ptr<const Upstream>& upstream,
                                                    size_t size_bytes, StreamHandle stream);

  ~UpstreamMemory();
  UpstreamMemory(UpstreamMemory&&) noexcept = default;
  UpstreamMemory& operator=(UpstreamMemory&&) = delete;
  UpstreamMemory(const UpstreamMemory&) = delete;
  UpstreamMemory& operator=(const UpstreamMemory&) = delete;

  DeviceAddress address() const { return address_; }
  size_t size_bytes() const { return size_bytes_; }

 private:
  UpstreamMemory(std::shared_ptr<const Upstream> upstream, void* pointer, size_t given_bytes,
                 size_t size_bytes);

  std::shared_ptr<const Upstream> upstream_;  // Null when moved from.
  void* pointer_;                             // What the upstream gave.
  size_t given_bytes_;
  DeviceAddress address_;
  size_t size_bytes_;
};

}  // namespace spillover
