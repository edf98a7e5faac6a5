#include "emulator/core/hazard_text.hpp"

#include <cstdio>
#include <cstring>

namespace spillover::emulator {
namespace {

thread_local ArgumentDescriber argument_describer = nullptr;
thread_local void* argument_context = nullptr;

std::string describe(const Access& access) {
  std::string text = std::string("by ") + access.name + " on " + place(access);
  if (access.actor != kHostActor) text += " (operation " + std::to_string(access.tick) + ")";
  return text;
}

std::string describe_range(const ByteRange& range) {
  char text[64];
  std::snprintf(text, sizeof text, "%zu bytes at 0x%zx", range.size_bytes, range.address);
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

bool is_copy(const Access& access) {
  return std::strncmp(access.name, "memcpy", 6) == 0;
}

// The handle that two streams had one after the other, or 0.
Address shared_handle(const Access& a, const Access& b, const ObjectHistory& history) {
  if (a.actor == kHostActor || b.actor == kHostActor || a.stream_id == b.stream_id) return 0;
  const ObjectHistory::Life* first = history.find_stream(a.stream_id);
  const ObjectHistory::Life* second = history.find_stream(b.stream_id);
  if (first == nullptr || second == nullptr || first->address != second->address) return 0;
  return first->address;
}

const char* kind_of(const Found& found, const ObjectHistory& history) {
  const Access& earlier = found.conflict.earlier;
  const bool after_write = found.conflict.earlier_kind == AccessKind::kWrite;
  const bool on_host = found.access.actor == kHostActor;
  if (shared_handle(earlier, found.access, history) != 0) return "reissued stream handle";
  if (found.conflict.earlier_kind == AccessKind::kFree) return "use after free";
  if (found.conflict.reused) return "block reused while another stream works on it";
  if (found.kind == AccessKind::kFree) {
    const bool is_unmap = std::strcmp(found.access.name, "cuMemUnmap") == 0;
    return is_unmap ? "unmap with work in flight" : "early free";
  }
  if (on_host && found.kind == AccessKind::kRead) return "host read before synchronising";
  if (on_host) return after_write ? "host write during a copy" : "staging buffer reused early";
  if (found.kind == AccessKind::kRead) {
    return is_copy(earlier) ? "no wait before use" : "no wait for the producer";
  }
  return after_write ? "two unordered writes" : "overwritten while in use";
}

std::string stack_line(const std::string& title, SiteId site) {
  const std::string stack = describe_site(site, "    ");
  return stack.empty() ? "" : "\n  " + title + " launched at:" + stack;
}

// What the allocator should have been told: nobody can wait for a stream that they do not know of.
std::string reuse_lines(const Found& found) {
  const std::string taken = describe_site(found.block->earlier_ended_at, "    ");
  const std::string user = std::to_string(found.conflict.earlier.stream_id);
  return (taken.empty() ? "" : "\n  its earlier owner gave it back at:" + taken) +
         "\n  tell the allocator that stream " + user +
         " uses the block: tensor.record_stream(stream_" + user +
         ") before the earlier owner gives it back";
}

// A thread that polls a flag knows nothing of what the thread that set it had waited for.
std::string elsewhere_line(const Found& found) {
  if (!found.is_known_elsewhere) return "";
  return std::string("\n  another host thread has waited for the ") +
         word(found.conflict.earlier_kind) +
         ", and nothing told this one: use threading or queue for the signal, or "
         "spillover.emulator.release and acquire";
}

// The order that is missing, and the call that adds it.
std::string missing_edge(const Found& found) {
  const Access& earlier = found.conflict.earlier;
  const std::string from = place(earlier) + " (operation " + std::to_string(earlier.tick) + ")";
  const std::string event = "event recorded on stream " + std::to_string(earlier.stream_id) +
                            " after the " + word(found.conflict.earlier_kind);
  if (found.access.actor == kHostActor) {
    return "\n  missing edge: " + from + " -> the host; add before the " + word(found.kind) +
           ": event.synchronize() with an " + event;
  }
  const std::string stream = "stream " + std::to_string(found.access.stream_id);
  return "\n  missing edge: " + from + " -> " + stream + "; add before the " + word(found.kind) +
         ": " + "stream_" + std::to_string(found.access.stream_id) + ".wait_event(" + event + ")";
}

}  // namespace

void set_argument_describer(ArgumentDescriber describer, void* context) {
  argument_describer = describer;
  argument_context = context;
}

std::string place(const Access& access) {
  if (access.actor == kHostActor) return "the host";
  return "stream " + std::to_string(access.stream_id);
}

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

std::string describe_access(const Access& access, AccessKind kind, const ByteRange& range) {
  return std::string(word(kind)) + " of " + describe_range(range) + " " + describe(access);
}

// Of the allocator's block where it is known, else of the driver's memory.
std::string describe_range_in_memory(const Found& found, const ObjectHistory& history) {
  const auto bytes_from = [&](Address begin) {
    const Address first = found.range.address - begin;
    return "\n  memory: bytes " + std::to_string(first) + " to " +
           std::to_string(first + found.range.size_bytes) + " of ";
  };
  if (found.block != nullptr && !found.block->ended) {
    const std::string made = describe_site(found.block->begun_at, "    ");
    return bytes_from(found.block_begin) + "a block of " +
           std::to_string(found.block->end - found.block_begin) + " bytes of a caching allocator" +
           (made.empty() ? "" : ", handed out at:" + made);
  }
  const auto* life = history.find_live(ObjectHistory::Kind::kMemory, found.range.address);
  return life == nullptr ? "" : bytes_from(life->address) + describe_memory(*life);
}

std::string describe_use(AccessKind kind, const ByteRange& range, SiteId site) {
  std::string text;
  if (argument_describer != nullptr) {
    char argument[512] = "";
    argument_describer(reinterpret_cast<const void*>(range.address), range.size_bytes,
                       argument_context, argument, sizeof argument);
    if (*argument != '\0') text += std::string("\n  operand: ") + argument;
  }
  return text + stack_line(std::string("the ") + word(kind) + " was", site);
}

std::string explain_conflict(const Found& found, const ObjectHistory& history) {
  const Access& earlier = found.conflict.earlier;
  const std::string before = word(found.conflict.earlier_kind);
  std::string text =
      "hazard: " + describe_access(found.access, found.kind, found.range) +
      " is not ordered after " + before + " " + describe(earlier) + "; " +
      advice(found.conflict.earlier_kind, found.kind, found.access.actor == kHostActor);
  text += std::string("\n  kind: ") + kind_of(found, history);
  const Address handle = shared_handle(earlier, found.access, history);
  if (handle != 0) {
    char line[160];
    std::snprintf(
        line, sizeof line,
        "\n  both streams had the handle 0x%zx: stream %llu was destroyed, and its handle "
        "issued again",
        handle, static_cast<unsigned long long>(earlier.stream_id));
    text += line;
  }
  text += describe_range_in_memory(found, history);
  text += describe_use(found.kind, found.range, found.access.site);
  text += stack_line("the earlier " + before + " was", earlier.site);
  if (found.conflict.reused) text += reuse_lines(found);
  return text + elsewhere_line(found) + missing_edge(found);
}

std::string explain_misuse(const std::string& text) {
  return "hazard: " + text;
}

}  // namespace spillover::emulator
