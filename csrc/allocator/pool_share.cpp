// Blocks that other processes open: Note [Shared memory] in shared_memory.hpp.
#include <algorithm>

#include "allocator/page_table.hpp"
#include "allocator/pool.hpp"
#include "driver/context.hpp"

namespace spillover {
namespace {

// Below this many files nobody looks for those that are needed no more.
constexpr size_t kFilesKept = 64;

}  // namespace

SharedBlock Pool::share(const void* pointer) {
  const std::lock_guard lock(mutex_);
  const RelaxedCaptureScope relaxed;
  Block* block = live_block(pointer);
  check_awake(block->heap->stream->arena);
  // Each search costs as much as there are shared blocks, so half of the files are new by then.
  if (backing_.file_count() >= std::max(kFilesKept, 2 * files_needed_)) close_unneeded_files();
  shared_blocks_.insert(block->address);
  SharedBlock shared = backing_.share({block->address, block->end()});
  block->is_shared = true;
  return shared;
}

void Pool::close_unneeded_files() {
  std::vector<AddressRange> kept;
  for (auto address = shared_blocks_.begin(); address != shared_blocks_.end();) {
    const Block* block = PageTable::instance().find(*address);
    if (block == nullptr || block->address != *address || block->state != BlockState::kLive) {
      address = shared_blocks_.erase(address);
      continue;
    }
    // Another block perhaps by now, with files that could be closed: those stay a while longer.
    kept.push_back({block->address, block->end()});
    ++address;
  }
  backing_.close_files(kept);
  files_needed_ = backing_.file_count();
}

std::vector<int> Pool::devices() const {
  const std::lock_guard lock(mutex_);
  return backing_.devices();
}

}  // namespace spillover
