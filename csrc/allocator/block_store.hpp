// Where Block objects live: they are reused and never deleted, so that a lookup by an address that
// is not live any more, which is a caller's mistake, still reads a block.
//
// Owned by one Pool and guarded by its mutex.
#pragma once

#include <cstddef>
#include <deque>
#include <vector>

#include "allocator/block.hpp"

namespace spillover {

class BlockStore {
 public:
  Block* take() {
    if (spare_.empty()) return &blocks_.emplace_back();
    Block* block = spare_.back();
    spare_.pop_back();
    return block;
  }
  void give(Block* block) { spare_.push_back(block); }

  size_t in_use() const { return blocks_.size() - spare_.size(); }

 private:
  std::deque<Block> blocks_;
  std::vector<Block*> spare_;
};

}  // namespace spillover
