#include "emulator/core/copy_batch.hpp"

#include <algorithm>
#include <cstdio>
#include <string>

#include "emulator/core/fault_plan.hpp"
#include "emulator/core/hazard_text.hpp"

namespace spillover::emulator {
namespace {

// The bytes that one copy reads or writes.
struct Touched {
  Address begin = 0;
  Address end = 0;
  std::size_t index = 0;
  bool is_write = false;
};

// Of what was seen so far, the two that reach furthest and belong to different copies.
class Furthest {
 public:
  void add(const Touched& touched) {
    if (touched.index == first_.index || touched.end >= first_.end) {
      if (touched.index != first_.index) second_ = first_;
      if (touched.end >= first_.end) first_ = touched;
    } else if (touched.end >= second_.end) {
      second_ = touched;
    }
  }

  // One of another copy that reaches beyond this one's begin; nullptr for none.
  const Touched* overlapping(const Touched& touched) const {
    const Touched& candidate = touched.index == first_.index ? second_ : first_;
    return candidate.end > touched.begin ? &candidate : nullptr;
  }

 private:
  Touched first_{0, 0, SIZE_MAX, false};
  Touched second_{0, 0, SIZE_MAX, false};
};

std::string describe(const Touched& touched) {
  char text[96];
  std::snprintf(text, sizeof text, "%s of %zu bytes at 0x%zx by copy %zu",
                touched.is_write ? "write" : "read", touched.end - touched.begin, touched.begin,
                touched.index);
  return text;
}

void report_dependence(Machine& machine, const Stream& stream, const char* name, const Touched& one,
                       const Touched& other) {
  const bool is_in_order = one.index < other.index;
  const Touched& earlier = is_in_order ? one : other;
  const Touched& later = is_in_order ? other : one;
  const Address overlap = std::max(one.begin, other.begin);
  std::string text = std::string(documented_name(name)) + " on stream " +
                     std::to_string(stream.id) + ": " + describe(later) + " is not ordered after " +
                     describe(earlier) +
                     " of the same batch; put it into a batch of its own\n  kind: dependent copies "
                     "in one batch\n  memory: " +
                     std::to_string(std::min(one.end, other.end) - overlap) +
                     " bytes that both touch, from byte " + std::to_string(overlap - later.begin) +
                     " of the later copy on";
  const auto* life = machine.hazards.history().find_live(ObjectHistory::Kind::kMemory, overlap);
  if (life != nullptr) text += ", of " + describe_memory(*life);
  const std::string used = describe_site(current_site(), "    ");
  if (!used.empty()) text += "\n  the batch was launched at:" + used;
  text +=
      "\n  missing edge: copies of a batch run in any order; two calls on the same stream run one "
      "after the other";
  machine.hazards.report_misuse(text, std::string("batch|") + name);
}

}  // namespace

bool check_independent(Machine& machine, const Stream& stream, const char* name,
                       const std::vector<Copy>& copies) {
  if (!machine.hazards.enabled() || copies.size() < 2) return false;
  std::vector<Touched> all;
  all.reserve(2 * copies.size());
  for (std::size_t i = 0; i < copies.size(); ++i) {
    const Copy& copy = copies[i];
    if (copy.width_bytes == 0) continue;
    all.push_back({copy.source, copy.source + copy.source_bytes(), i, false});
    all.push_back({copy.destination, copy.destination + copy.destination_bytes(), i, true});
  }
  std::sort(all.begin(), all.end(),
            [](const Touched& a, const Touched& b) { return a.begin < b.begin; });
  Furthest any;
  Furthest written;
  for (const Touched& touched : all) {
    const Touched* other = (touched.is_write ? any : written).overlapping(touched);
    if (other != nullptr) {
      report_dependence(machine, stream, name, *other, touched);
      return true;
    }
    any.add(touched);
    if (touched.is_write) written.add(touched);
  }
  return false;
}

}  // namespace spillover::emulator
