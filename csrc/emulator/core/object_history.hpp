// What the checker remembers of memory, streams and events beyond their lives, so that a use of one
// that is gone can be named, and what is left at the end be listed with where it was made.
//
// Owned by the Machine; guarded by Machine::mutex. Empty while the checker is off.
//
// Invariant: what is gone is kept for the last kGoneMax objects of each kind.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "emulator/core/call_site.hpp"
#include "emulator/core/types.hpp"

namespace spillover::emulator {

class ObjectHistory {
 public:
  // One life: of memory, with its address and size, or of a stream or event, with its handle.
  struct Life {
    Address address = 0;
    std::size_t size_bytes = 0;
    const char* made_by = "";
    SiteId made_at = 0;
    const char* ended_by = "";
    SiteId ended_at = 0;
    std::uint64_t id = 0;  // of a stream
  };

  enum class Kind { kMemory, kStream, kEvent };

  // By the call that the thread is in.
  void begin(Kind kind, Address address, std::size_t size_bytes, std::uint64_t id = 0);
  void end(Kind kind, Address address);
  // Every mapping that begins in the range.
  void end_range(Address address, std::size_t size_bytes);

  // The latest life that ended and covers the address, or nullptr; one that lives does not count.
  const Life* find_gone(Kind kind, Address address) const;
  const Life* find_live(Kind kind, Address address) const;

  // A stream by its number, dead or alive.
  const Life* find_stream(std::uint64_t id) const;

  // What lives, oldest first within a kind, as text.
  std::vector<std::string> live_texts() const;

 private:
  static constexpr std::size_t kGoneMax = 4096;

  struct Lives {
    std::map<Address, Life> live;
    std::deque<Life> gone;
  };

  Lives& of(Kind kind) { return lives_[static_cast<std::size_t>(kind)]; }
  const Lives& of(Kind kind) const { return lives_[static_cast<std::size_t>(kind)]; }

  Lives lives_[3];
};

// "4096 bytes that cuMemAlloc gave at 0x..., freed by cuMemFree", and both stacks.
std::string describe_memory(const ObjectHistory::Life& life);

}  // namespace spillover::emulator
