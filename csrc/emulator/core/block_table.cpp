#include "emulator/core/block_table.hpp"

#include <iterator>
#include <utility>

namespace spillover::emulator {

std::map<Address, Block>::iterator BlockTable::first_overlap(Address address) {
  auto position = blocks_.upper_bound(address);
  if (position != blocks_.begin() && std::prev(position)->second.end > address) --position;
  return position;
}

void BlockTable::forget(Address address, std::size_t size_bytes) {
  const Address end = address + size_bytes;
  for (auto position = first_overlap(address);
       position != blocks_.end() && position->first < end;) {
    const Address begin = position->first;
    const Block block = position->second;
    position = blocks_.erase(position);
    // What is left of it on both sides stays as it was.
    if (begin < address) {
      Block& left = blocks_[begin] = block;
      left.end = address;
    }
    if (block.end > end) position = blocks_.emplace(end, block).first;
  }
}

void BlockTable::insert(Address address, Block block) {
  const auto known = blocks_.find(address);
  if (known != blocks_.end() && known->second.end == block.end) {
    known->second = std::move(block);
    return;
  }
  forget(address, block.end - address);
  blocks_.emplace(address, std::move(block));
}

void BlockTable::end(Address address, std::size_t size_bytes, SiteId site,
                     std::shared_ptr<const VectorClock> clock) {
  const auto position = blocks_.find(address);
  if (position != blocks_.end()) {
    position->second.ended = true;
    position->second.ended_at = site;
    position->second.clock = std::move(clock);
  } else if (size_bytes != 0) {
    insert(address, Block{address + size_bytes, 0, 0, true, site, {}, std::move(clock), 0});
  }
}

const Block* BlockTable::find(Address address, Address* begin) const {
  auto position = blocks_.upper_bound(address);
  if (position == blocks_.begin()) return nullptr;
  --position;
  if (position->second.end <= address) return nullptr;
  *begin = position->first;
  return &position->second;
}

}  // namespace spillover::emulator
