#include "allocator/upstream.hpp"

#include <utility>

#include "allocator/block.hpp"
#include "base/bytes.hpp"

namespace spillover {
namespace {

thread_local int t_running_count = 0;

class RunningScope {
 public:
  RunningScope() { ++t_running_count; }
  ~RunningScope() { --t_running_count; }
  RunningScope(const RunningScope&) = delete;
  RunningScope& operator=(const RunningScope&) = delete;
};

}  // namespace

bool Upstream::is_running() {
  return t_running_count != 0;
}

Upstream::~Upstream() {
  const RunningScope scope;
  if (done) done();
}

std::optional<UpstreamMemory> UpstreamMemory::try_allocate(
    const std::shared_ptr<const Upstream>& upstream, size_t size_bytes, StreamHandle stream) {
  for (;;) {
    const size_t padding_bytes = upstream->padding_bytes;
    const size_t given_bytes = size_bytes + padding_bytes;
    void* pointer = nullptr;
    {
      const RunningScope scope;
      pointer = upstream->allocate(given_bytes, stream);
    }
    if (pointer == nullptr) return std::nullopt;
    UpstreamMemory memory(upstream, pointer, given_bytes, size_bytes);
    const DeviceAddress begin = reinterpret_cast<DeviceAddress>(pointer);
    if (memory.address() + size_bytes <= begin + given_bytes) return memory;
    upstream->padding_bytes = kBlockAlignment;
  }
}

UpstreamMemory::UpstreamMemory(std::shared_ptr<const Upstream> upstream, void* pointer,
                               size_t given_bytes, size_t size_bytes)
    : upstream_(std::move(upstream)),
      pointer_(pointer),
      given_bytes_(given_bytes),
      address_(round_up(reinterpret_cast<DeviceAddress>(pointer), kBlockAlignment)),
      size_bytes_(size_bytes) {}

UpstreamMemory::~UpstreamMemory() {
  if (upstream_ == nullptr) return;
  const RunningScope scope;
  upstream_->free(pointer_, given_bytes_);
}

}  // namespace spillover
