// What of a tag's memory is copied when it sleeps and wakes, in which pieces, and which chunks each
// piece needs.
#include <algorithm>
#include <iterator>

#include "allocator/pool.hpp"

namespace spillover {
namespace {

// A piece is copied, unmapped and given up as one. Of one size, so that the host memory of one
// sleep serves the next, and of a large chunk's, so that a waking maps large chunks.
constexpr size_t kPieceBytes = 32 * kMiB;

void add(std::vector<ContentPiece>& pieces, AddressRange range) {
  while (range.size_bytes() != 0) {
    if (pieces.empty() || pieces.back().size_bytes == kPieceBytes) pieces.emplace_back();
    ContentPiece& piece = pieces.back();
    const size_t part_bytes = std::min(range.size_bytes(), kPieceBytes - piece.size_bytes);
    if (!piece.parts.empty() && piece.parts.back().end() == range.begin) {
      piece.parts.back().size_bytes += part_bytes;
    } else {
      piece.parts.push_back({range.begin, part_bytes, piece.size_bytes});
    }
    piece.size_bytes += part_bytes;
    range.begin += part_bytes;
  }
}

// Appends a range, as a part of the last one where it continues that and both are in the segment.
void append(std::vector<AddressRange>& ranges, const AddressRange& range,
            const AddressRange& segment) {
  if (range.begin != segment.begin && !ranges.empty() && ranges.back().end == range.begin) {
    ranges.back().end = range.end;
  } else {
    ranges.push_back(range);
  }
}

}  // namespace

// Memory with contents to keep, by address: live blocks, and everything of a private arena in use,
// whose free memory is not idle (Note [Private arenas]).
std::vector<AddressRange> Pool::live_ranges(ArenaId tag) const {
  std::vector<AddressRange> ranges;
  for (const auto& [address, first] : segments_) {
    const StreamState& stream = *first->heap->stream;
    if (tag_of(stream.arena) != tag) continue;
    for (const Block* block = first; block != nullptr; block = block->next) {
      if (block->state != BlockState::kLive && !stream.is_private()) continue;
      append(ranges, {block->address, block->end()}, {address, address});
    }
  }
  return ranges;
}

// Each chunk of the tag goes to the first or the last piece that is in it.
void Pool::assign_chunks(ArenaId tag, const std::vector<SavedRange>& saved, bool is_by_first,
                         SleepPlan& plan) const {
  plan.chunks.resize(plan.pieces.size());
  for (const AddressRange& segment : segments_of(tag)) {
    for (const AddressRange& chunk : backing_.chunks_in(segment)) {
      const auto first = std::upper_bound(
          saved.begin(), saved.end(), chunk.begin,
          [](DeviceAddress address, const SavedRange& range) { return address < range.end; });
      const auto behind = std::lower_bound(
          first, saved.end(), chunk.end,
          [](const SavedRange& range, DeviceAddress address) { return range.begin < address; });
      if (first == behind) {
        append(plan.empty_chunks, chunk, segment);
      } else {
        const size_t piece = is_by_first ? first->piece : std::prev(behind)->piece;
        append(plan.chunks[piece], chunk, segment);
      }
    }
  }
}

Pool::SleepPlan Pool::plan_sleep(ArenaId tag, bool is_kept) const {
  SleepPlan plan;
  std::vector<SavedRange> saved;
  if (is_kept) {
    for (const AddressRange& range : live_ranges(tag)) add(plan.pieces, range);
    for (size_t piece = 0; piece < plan.pieces.size(); ++piece) {
      for (const ContentPart& part : plan.pieces[piece].parts) {
        saved.push_back({part.address, part.end(), piece});
      }
    }
  }
  assign_chunks(tag, saved, false, plan);
  return plan;
}

// The parts of what was saved whose blocks still live.
Pool::SleepPlan Pool::plan_wake(ArenaId tag) const {
  SleepPlan plan;
  std::vector<SavedRange> saved;
  const Sleeping& sleeping = sleeping_.at(tag);
  const std::vector<AddressRange> live = live_ranges(tag);
  auto range = live.begin();
  for (size_t piece = 0; piece < sleeping.pieces.size(); ++piece) {
    ContentPiece& wanted = plan.pieces.emplace_back();
    for (const ContentPart& part : sleeping.pieces[piece].parts) {
      while (range != live.end() && range->end <= part.address) ++range;
      for (auto here = range; here != live.end() && here->begin < part.end(); ++here) {
        const DeviceAddress begin = std::max(part.address, here->begin);
        const DeviceAddress end = std::min(part.end(), here->end);
        wanted.parts.push_back({begin, end - begin, part.offset_bytes + (begin - part.address)});
        wanted.size_bytes += end - begin;
        saved.push_back({begin, end, piece});
      }
    }
  }
  assign_chunks(tag, saved, true, plan);
  return plan;
}

}  // namespace spillover
