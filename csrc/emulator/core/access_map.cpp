#include "emulator/core/access_map.hpp"

#include <iterator>
#include <utility>

namespace spillover::emulator {
namespace {

bool is_ordered(const Access& earlier, const Access& later, const VectorClock& clock) {
  return earlier.name == nullptr || earlier.actor == later.actor ||
         clock.at(earlier.actor) >= earlier.tick;
}

AccessKind kind_of_write(const Access& write) {
  return write.is_free ? AccessKind::kFree : AccessKind::kWrite;
}

// Keeps one read an actor: its later reads are ordered after its earlier ones.
void add_read(std::vector<Access>* reads, const Access& access) {
  for (Access& known : *reads) {
    if (known.actor != access.actor) continue;
    known = access;
    return;
  }
  reads->push_back(access);
}

}  // namespace

AccessMap::CacheSlot& AccessMap::slot_of(Address begin) {
  // Fibonacci hashing; buffers start at multiples of 512 bytes or more.
  return cache_[((begin >> 9) * 0x9E3779B97F4A7C15U) >> 52];
}

AccessMap::Segments::iterator AccessMap::find_exact(Address begin, Address end) {
  CacheSlot& slot = slot_of(begin);
  if (slot.epoch != epoch_ || slot.segment->first != begin) {
    const auto found = segments_.find(begin);
    if (found == segments_.end()) return found;
    slot = {epoch_, found};
  }
  return slot.segment->second.end == end ? slot.segment : segments_.end();
}

void AccessMap::erase(Segments::iterator first, Segments::iterator last) {
  if (first == last) return;
  ++epoch_;
  segments_.erase(first, last);
}

void AccessMap::split(Segments::iterator position, Address at) {
  Segment tail = position->second;
  position->second.end = at;
  segments_.emplace_hint(std::next(position), at, std::move(tail));
}

AccessMap::Segments::iterator AccessMap::first_inside(Address begin, Address end) {
  auto position = segments_.lower_bound(begin);
  if (position != segments_.begin()) {
    const auto previous = std::prev(position);
    if (previous->second.end > begin) {
      split(previous, begin);
      position = std::next(previous);
    }
  }
  // The last segment may stick out at the far end.
  const auto after = segments_.lower_bound(end);
  if (after != segments_.begin()) {
    const auto last = std::prev(after);
    if (last->second.end > end) split(last, end);
  }
  return position;
}

bool AccessMap::record(Address begin, Address end, AccessKind kind, const Access& access,
                       const VectorClock& clock, Conflict* conflict) {
  if (begin >= end) return false;
  if (kind == AccessKind::kRead) return record_read(begin, end, access, clock, conflict);
  Access write = access;
  write.is_free = kind == AccessKind::kFree;
  return record_write(begin, end, write, clock, conflict);
}

bool AccessMap::record_write(Address begin, Address end, const Access& access,
                             const VectorClock& clock, Conflict* conflict) {
  bool found = false;
  const auto check = [&](const Access& earlier, AccessKind kind) {
    if (found || is_ordered(earlier, access, clock)) return;
    *conflict = {earlier, kind};
    found = true;
  };
  const auto exact = find_exact(begin, end);
  if (exact != segments_.end()) {
    Segment& segment = exact->second;
    check(segment.write, kind_of_write(segment.write));
    for (const Access& read : segment.reads) check(read, AccessKind::kRead);
    segment.write = access;
    segment.reads.clear();
    return found;
  }
  const auto first = first_inside(begin, end);
  auto position = first;
  while (position != segments_.end() && position->first < end) {
    check(position->second.write, kind_of_write(position->second.write));
    for (const Access& read : position->second.reads) check(read, AccessKind::kRead);
    ++position;
  }
  // One segment takes the place of all; the first one is kept where it starts right.
  if (first != position && first->first == begin) {
    first->second.end = end;
    first->second.write = access;
    first->second.reads.clear();
    erase(std::next(first), position);
    return found;
  }
  erase(first, position);
  segments_.emplace_hint(position, begin, Segment{end, access, {}});
  return found;
}

bool AccessMap::record_read(Address begin, Address end, const Access& access,
                            const VectorClock& clock, Conflict* conflict) {
  bool found = false;
  const auto exact = find_exact(begin, end);
  auto position = exact != segments_.end() ? exact : first_inside(begin, end);
  Address cursor = begin;
  while (cursor < end) {
    if (position == segments_.end() || position->first > cursor) {
      // A gap that nobody touched yet.
      const Address gap_end =
          position == segments_.end() || position->first > end ? end : position->first;
      segments_.emplace_hint(position, cursor, Segment{gap_end, Access{}, {access}});
      cursor = gap_end;
      continue;
    }
    Segment& segment = position->second;
    if (!found && !is_ordered(segment.write, access, clock)) {
      *conflict = {segment.write, kind_of_write(segment.write)};
      found = true;
    }
    add_read(&segment.reads, access);
    cursor = segment.end;
    ++position;
  }
  return found;
}

bool AccessMap::find_conflict(Address begin, Address end, AccessKind kind, const Access& access,
                              const VectorClock& clock, Conflict* conflict) {
  if (begin >= end) return false;
  auto position = find_exact(begin, end);
  if (position == segments_.end()) {
    position = segments_.upper_bound(begin);
    if (position != segments_.begin() && std::prev(position)->second.end > begin) --position;
  }
  for (; position != segments_.end() && position->first < end; ++position) {
    const Segment& segment = position->second;
    if (!is_ordered(segment.write, access, clock)) {
      *conflict = {segment.write, kind_of_write(segment.write)};
      return true;
    }
    if (kind == AccessKind::kRead) continue;
    for (const Access& read : segment.reads) {
      if (is_ordered(read, access, clock)) continue;
      *conflict = {read, AccessKind::kRead};
      return true;
    }
  }
  return false;
}

Address AccessMap::find_unwritten(Address begin, Address end, std::uint64_t order) const {
  auto position = segments_.upper_bound(begin);
  if (position != segments_.begin() && std::prev(position)->second.end > begin) --position;
  Address cursor = begin;
  for (; cursor < end; ++position) {
    if (position == segments_.end() || position->first > cursor) return cursor;
    const Access& write = position->second.write;
    if (write.name == nullptr || write.is_free || write.order < order) return cursor;
    cursor = position->second.end;
  }
  return end;
}

void AccessMap::copy(Address begin, Address end, Address place) {
  auto position = first_inside(begin, end);
  std::vector<std::pair<Address, Segment>> found;
  for (; position != segments_.end() && position->first < end; ++position) {
    found.emplace_back(*position);
  }
  for (auto& [first, segment] : found) {
    segment.end = segment.end - begin + place;
    segments_.emplace(first - begin + place, std::move(segment));
  }
}

void AccessMap::clear(Address begin, Address end) {
  if (begin >= end) return;
  const auto first = first_inside(begin, end);
  erase(first, segments_.lower_bound(end));
}

}  // namespace spillover::emulator
