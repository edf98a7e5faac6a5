// The words of a hazard's report: what happened, to which bytes, where in the program, which order
// is missing, and the call that would add it.
//
// Stateless; called with Machine::mutex held.
#pragma once

#include <cstddef>
#include <string>

#include "emulator/core/access_map.hpp"
#include "emulator/core/block_table.hpp"
#include "emulator/core/object_history.hpp"

namespace spillover::emulator {

// What an address is to the operator that the calling thread runs ("argument self: float32 [8, 8],
// bytes 0 to 256"). Whoever runs operators sets it for the duration of a call into the checker.
using ArgumentDescriber = std::size_t (*)(const void* address, std::size_t size_bytes,
                                          void* context, char* out, std::size_t capacity);
void set_argument_describer(ArgumentDescriber describer, void* context);

// "the host", "stream 3".
std::string place(const Access& access);
const char* word(AccessKind kind);

struct Found {
  Conflict conflict;
  Access access;
  AccessKind kind = AccessKind::kRead;
  ByteRange range;
  const Block* block = nullptr;  // of a caching allocator, that the range lies in
  Address block_begin = 0;
  bool is_known_elsewhere = false;  // another thread of the host has waited for the earlier access
};

// An access that is not ordered after an earlier one. The first line says it all; the others help.
std::string explain_conflict(const Found& found, const ObjectHistory& history);

// A use of something that is gone, or was never there.
std::string explain_misuse(const std::string& text);

// "read of 8 bytes at 0x... by aten::add on stream 0".
std::string describe_access(const Access& access, AccessKind kind, const ByteRange& range);

// Which bytes of which memory: a further line of a report.
std::string describe_range_in_memory(const Found& found, const ObjectHistory& history);

// The stack of an access and what the argument is, as the report's further lines.
std::string describe_use(AccessKind kind, const ByteRange& range, SiteId site);

}  // namespace spillover::emulator
