#include "emulator/core/object_history.hpp"

#include <algorithm>
#include <cstdio>
#include <iterator>

#include "emulator/core/fault_plan.hpp"

namespace spillover::emulator {
namespace {

std::string hex(Address address) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%zx", address);
  return text;
}

}  // namespace

void ObjectHistory::begin(Kind kind, Address address, std::size_t size_bytes, std::uint64_t id) {
  Life life;
  life.address = address;
  life.size_bytes = size_bytes;
  life.made_by = current_call();
  life.made_at = current_site();
  life.id = id;
  of(kind).live[address] = life;
}

void ObjectHistory::end(Kind kind, Address address) {
  Lives& lives = of(kind);
  const auto position = lives.live.find(address);
  if (position == lives.live.end()) return;
  Life life = position->second;
  lives.live.erase(position);
  life.ended_by = current_call();
  life.ended_at = current_site();
  lives.gone.push_back(life);
  if (lives.gone.size() > kGoneMax) lives.gone.pop_front();
}

void ObjectHistory::end_range(Address address, std::size_t size_bytes) {
  const auto& live = of(Kind::kMemory).live;
  for (auto position = live.lower_bound(address);
       position != live.end() && position->first < address + size_bytes;) {
    end(Kind::kMemory, (position++)->first);
  }
}

const ObjectHistory::Life* ObjectHistory::find_live(Kind kind, Address address) const {
  const auto& live = of(kind).live;
  auto position = live.upper_bound(address);
  if (position == live.begin()) return nullptr;
  const Life& life = std::prev(position)->second;
  return address - life.address < std::max<std::size_t>(life.size_bytes, 1) ? &life : nullptr;
}

const ObjectHistory::Life* ObjectHistory::find_gone(Kind kind, Address address) const {
  if (find_live(kind, address) != nullptr) return nullptr;
  const auto& gone = of(kind).gone;
  const auto position = std::find_if(gone.rbegin(), gone.rend(), [&](const Life& life) {
    return address - life.address < std::max<std::size_t>(life.size_bytes, 1);
  });
  return position == gone.rend() ? nullptr : &*position;
}

const ObjectHistory::Life* ObjectHistory::find_stream(std::uint64_t id) const {
  const Lives& streams = of(Kind::kStream);
  for (const auto& [handle, life] : streams.live) {
    if (life.id == id) return &life;
  }
  const auto gone = std::find_if(streams.gone.begin(), streams.gone.end(),
                                 [&](const Life& life) { return life.id == id; });
  return gone == streams.gone.end() ? nullptr : &*gone;
}

std::vector<std::string> ObjectHistory::live_texts() const {
  std::vector<std::string> texts;
  for (const auto& [address, life] : of(Kind::kMemory).live) {
    texts.push_back("leak: " + describe_memory(life));
  }
  for (const Kind kind : {Kind::kStream, Kind::kEvent}) {
    const char* const name = kind == Kind::kStream ? "leak: stream " : "leak: event ";
    for (const auto& [handle, life] : of(kind).live) {
      const std::string stack = describe_site(life.made_at, "    ");
      texts.push_back(name + hex(handle) + " of " + std::string(documented_name(life.made_by)) +
                      (stack.empty() ? "" : ", made at:" + stack));
    }
  }
  return texts;
}

std::string describe_memory(const ObjectHistory::Life& life) {
  const std::string maker(documented_name(life.made_by));
  std::string text =
      std::to_string(life.size_bytes) + " bytes at " + hex(life.address) + " from " + maker;
  const std::string made = describe_site(life.made_at, "    ");
  // Caches of pinned memory give it to one user after the other, and tell nobody.
  const bool is_pinned = maker == "cuMemHostAlloc" || maker == "cuMemHostRegister";
  if (!made.empty()) text += std::string(is_pinned ? ", first" : ",") + " made at:" + made;
  if (*life.ended_by == '\0') return text;
  text += std::string(made.empty() ? "; " : "\n  ") + "given back by ";
  text += documented_name(life.ended_by);
  const std::string ended = describe_site(life.ended_at, "    ");
  return ended.empty() ? text : text + " at:" + ended;
}

}  // namespace spillover::emulator
