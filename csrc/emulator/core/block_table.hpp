// Blocks that a caching allocator hands out inside the memory it got from the driver, as far as it
// tells (c_api.h, spillover_emulator_block_begin): a use of a block after it was taken back, and a
// block that is handed out while a stream still works on it, cannot be seen from the driver.
//
// Owned by the HazardChecker; guarded by Machine::mutex.
//
// Invariant: blocks do not overlap. An ended block is kept until its bytes are handed out again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <set>

#include "emulator/core/call_site.hpp"
#include "emulator/core/types.hpp"
#include "emulator/core/vector_clock.hpp"

namespace spillover::emulator {

// Where an allocator took a block from.
struct BlockOrigin {
  std::uint64_t pool = 0;   // 0: the memory that everybody shares
  bool in_capture = false;  // handed out while a capture went on
};

struct Block {
  Address end = 0;
  std::uint64_t begun = 0;  // an access with a smaller order was to an earlier block
  SiteId begun_at = 0;
  bool ended = false;
  SiteId ended_at = 0;
  BlockOrigin origin;
  std::shared_ptr<const VectorClock> clock;  // what the thread that gave it back knew
  SiteId earlier_ended_at = 0;  // where the allocator got the bytes back that it handed out again
};

class BlockTable {
 public:
  bool empty() const { return blocks_.empty(); }

  // Calls learn(clock) for each ended block of whose bytes the new one is made: an allocator hands
  // over under a lock of its own.
  template <typename Learn>
  void begin(Address address, std::size_t size_bytes, std::uint64_t order, SiteId site,
             BlockOrigin origin, Learn&& learn) {
    const Address end = address + size_bytes;
    SiteId earlier_ended_at = 0;
    for (auto position = first_overlap(address); position != blocks_.end() && position->first < end;
         ++position) {
      if (position->second.clock != nullptr) learn(*position->second.clock);
      if (position->second.ended_at != 0) earlier_ended_at = position->second.ended_at;
    }
    if (origin.pool != 0 && origin.in_capture) graph_pools_.insert(origin.pool);
    insert(address, Block{end, order, site, false, 0, origin, nullptr, earlier_ended_at});
  }
  // Also of a block whose beginning nobody told.
  void end(Address address, std::size_t size_bytes, SiteId site,
           std::shared_ptr<const VectorClock> clock);
  void forget(Address address, std::size_t size_bytes);

  // The block that holds the address, or nullptr.
  const Block* find(Address address, Address* begin) const;

  // Whether graphs go on using the block's address after it was taken back. A pool that was ever
  // captured into keeps its memory for its graphs, and torch's graph trees write the inputs of a
  // replay to addresses that they gave back to it.
  bool is_kept_for_graphs(const Block& block) const {
    return block.origin.pool != 0 && graph_pools_.contains(block.origin.pool);
  }

 private:
  std::map<Address, Block>::iterator first_overlap(Address address);
  void insert(Address address, Block block);

  std::map<Address, Block> blocks_;
  std::set<std::uint64_t> graph_pools_;
};

}  // namespace spillover::emulator
