#include "emulator/core/hazard_checker.hpp"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <utility>

namespace spillover::emulator {
namespace {

// Of a type without a destructor, so that it can be read while a thread or the process ends.
thread_local char last_hazard_text[1024] = "";

const char* word(AccessKind kind) {
  switch (kind) {
    case AccessKind::kRead:
      return "read";
    case AccessKind::kWrite:
      return "write";
    case AccessKind::kFree:
      return "free";
  }
  return "access";
}

std::string place(const Access& access) {
  if (access.actor == kHostActor) return "the host";
  return "stream " + std::to_string(access.stream_id);
}

std::string describe(const Access& access) {
  std::string text = std::string("by ") + access.name + " on " + place(access);
  if (access.actor != kHostActor) text += " (operation " + std::to_string(access.tick) + ")";
  return text;
}

// What the program should do about it.
std::string advice(AccessKind earlier, AccessKind later, bool on_host) {
  const std::string before = word(earlier);
  if (later == AccessKind::kFree && on_host) {
    return "free it later: synchronise with the stream, or with an event recorded after the " +
           before;
  }
  if (on_host) {
    return "the host must wait: synchronise with the stream, or with an event recorded after the " +
           before;
  }
  const std::string who = later == AccessKind::kRead    ? "reader"
                          : later == AccessKind::kWrite ? "writer"
                                                        : "stream that frees";
  return "make the " + who + " wait: record an event after the " + before + " and wait for it";
}

std::string explain(const Conflict& conflict, const Access& access, AccessKind kind,
                    Address address, std::size_t size_bytes) {
  char range[64];
  std::snprintf(range, sizeof range, "%zu bytes at 0x%zx ", size_bytes, address);
  return std::string("hazard: ") + word(kind) + " of " + range + describe(access) +
         " is not ordered after " + word(conflict.earlier_kind) + " " + describe(conflict.earlier) +
         "; " + advice(conflict.earlier_kind, kind, access.actor == kHostActor);
}

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

bool HazardChecker::record(const Access& access, const VectorClock& clock, AccessKind kind,
                           const ByteRange& range, Address key, Recording recording) {
  Conflict conflict;
  const Address end = key + range.size_bytes;
  const bool found = recording == Recording::kYes
                         ? accesses_.record(key, end, kind, access, clock, &conflict)
                         : accesses_.find_conflict(key, end, kind, access, clock, &conflict);
  if (!found) return false;
  std::string pair = std::string(conflict.earlier.name) + "|" + place(conflict.earlier) + "|" +
                     access.name + "|" + place(access) + "|" + word(kind);
  add_report(explain(conflict, access, kind, range.address, range.size_bytes), std::move(pair));
  return true;
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
}

void HazardChecker::clear_reports() {
  count_ = 0;
  texts_.clear();
  reported_pairs_.clear();
}

}  // namespace spillover::emulator
