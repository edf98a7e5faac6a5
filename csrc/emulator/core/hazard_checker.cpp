#include "emulator/core/hazard_checker.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include "emulator/core/hazard_text.hpp"

namespace spillover::emulator {
namespace {

// Of a type without a destructor, so that it can be read while a thread or the process ends.
// Four stacks of long paths fit.
thread_local char last_hazard_text[16384] = "";

}  // namespace

const char* last_hazard() {
  return last_hazard_text;
}

const char* HazardChecker::intern(const char* name) {
  // Operators hand in the same literal again and again, so its address finds it; the comparison
  // keeps this right for callers whose buffers change.
  const std::size_t slot = (reinterpret_cast<std::uintptr_t>(name) >> 3) % kNameCacheSize;
  CachedName& cached = name_cache_[slot];
  if (cached.given == name && std::strcmp(cached.interned, name) == 0) return cached.interned;
  cached = {name, names_.emplace(name).first->c_str()};
  return cached.interned;
}

bool HazardChecker::record(const Access& access, const VectorClock& clock,
                           const VectorClock& everyone, AccessKind kind, const ByteRange& range,
                           Address key, Recording recording) {
  Conflict conflict;
  const Address end = key + range.size_bytes;
  const bool found = recording == Recording::kYes
                         ? accesses_.record(key, end, kind, access, clock, &conflict)
                         : accesses_.find_conflict(key, end, kind, access, clock, &conflict);
  if (!found) return false;
  Address block_begin = 0;
  const Block* block = blocks_.find(range.address, &block_begin);
  conflict.reused = block != nullptr && conflict.earlier.order < block->begun;
  std::string pair = std::string(conflict.earlier.name) + "|" + place(conflict.earlier) + "|" +
                     access.name + "|" + place(access) + "|" + word(kind);
  const bool is_known_elsewhere = everyone.at(conflict.earlier.actor) >= conflict.earlier.tick;
  const Found found_conflict{conflict, access, kind, range, block, block_begin, is_known_elsewhere};
  add_report(explain_conflict(found_conflict, history_), std::move(pair));
  return true;
}

bool HazardChecker::check_block(const Access& access, AccessKind kind, const ByteRange& range) {
  if (blocks_.empty() || kind == AccessKind::kFree) return false;
  Address begin = 0;
  const Block* block = blocks_.find(range.address, &begin);
  if (block == nullptr || !block->ended) return false;
  // A graph goes on using what was handed out and taken back while it was captured: the allocator
  // keeps that memory for it.
  if (access.in_graph && block->origin.in_capture) return false;
  if (blocks_.is_kept_for_graphs(*block)) return false;
  std::string text = describe_access(access, kind, range) +
                     " after the allocator took the block back\n  kind: use after free";
  const std::string made = describe_site(block->begun_at, "    ");
  const std::string ended = describe_site(block->ended_at, "    ");
  text += "\n  memory: block of " + std::to_string(block->end - begin) +
          " bytes of a caching allocator";
  if (!made.empty()) text += ", handed out at:" + made;
  if (!ended.empty()) text += "\n  taken back at:" + ended;
  text += describe_use(kind, range, access.site);
  text += "\n  keep a reference to the tensor for as long as its address is in use";
  report_misuse(text, std::string("block|") + access.name);
  return true;
}

bool HazardChecker::check_written(const Access& access, AccessKind kind, const ByteRange& range) {
  if (kind != AccessKind::kRead) return false;
  Address begin = 0;
  const Block* block = blocks_.find(range.address, &begin);
  const Address end = range.address + range.size_bytes;
  // What was written to a graphs' pool stays when the allocator hands the bytes out again, as it
  // does where torch's graph trees take the pool back to an earlier state.
  const bool is_fresh = block != nullptr && !blocks_.is_kept_for_graphs(*block);
  const Address first = accesses_.find_unwritten(range.address, end, is_fresh ? block->begun : 0);
  if (first == end) return false;
  Found found;
  found.range = range;
  found.block = block;
  found.block_begin = begin;
  report_misuse(
      describe_access(access, kind, range) + " reads bytes that were never written, from byte " +
          std::to_string(first - range.address) + " on\n  kind: uninitialised read" +
          describe_range_in_memory(found, history_) + describe_use(kind, range, access.site) +
          "\n  write the memory first; torch.empty and cudaMalloc leave it as it is",
      std::string("unwritten|") + access.name);
  return true;
}

void HazardChecker::report_misuse(const std::string& text, std::string pair) {
  add_report(explain_misuse(text), std::move(pair));
}

void HazardChecker::copy_history(const ByteRange& range, Address key) {
  accesses_.copy(range.address, range.address + range.size_bytes, key);
}

void HazardChecker::add_report(std::string text, std::string pair) {
  ++count_;
  const std::size_t length = std::min(text.size(), sizeof last_hazard_text - 1);
  std::memcpy(last_hazard_text, text.data(), length);
  last_hazard_text[length] = '\0';
  if (texts_.size() >= kTextsMax || !reported_pairs_.insert(std::move(pair)).second) return;
  if (policy_ == HazardPolicy::kWarn) report("%s", text.c_str());
  texts_.push_back(std::move(text));
}

void HazardChecker::forget(Address address, std::size_t size_bytes) {
  accesses_.clear(address, address + size_bytes);
  blocks_.forget(address, size_bytes);
}

void HazardChecker::clear_reports() {
  count_ = 0;
  texts_.clear();
  reported_pairs_.clear();
}

}  // namespace spillover::emulator
