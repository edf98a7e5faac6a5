// The happens-before checker: finds accesses to the same bytes that nothing orders, whatever the
// schedule made of them, and says what is missing (vector_clock.hpp, Note [Happens-before]).
//
// Owned by the Machine; guarded by Machine::mutex, but for enabled(), which is constant, and
// last_hazard, which is each thread's own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_set>
#include <vector>

#include "emulator/core/access_map.hpp"
#include "emulator/core/block_table.hpp"
#include "emulator/core/config.hpp"
#include "emulator/core/object_history.hpp"
#include "emulator/core/types.hpp"

namespace spillover::emulator {

// Whether an access is kept once it has been checked: one that the caller may still refuse is not.
enum class Recording { kYes, kNo };

class HazardChecker {
 public:
  explicit HazardChecker(HazardPolicy policy) : policy_(policy) {}

  bool enabled() const { return policy_ != HazardPolicy::kOff; }
  bool raises() const { return policy_ == HazardPolicy::kRaise; }

  // A copy of name that lives for ever; equal names give equal pointers.
  const char* intern(const char* name);

  // Records an access and reports the first hazard in it. True when there was one. Its history is
  // kept at key, which is range.address but for aliased memory. everyone is what any thread of the
  // host knows, for the report.
  bool record(const Access& access, const VectorClock& clock, const VectorClock& everyone,
              AccessKind kind, const ByteRange& range, Address key, Recording recording);

  // Reports a use of something that is gone or was never there. pair says what it is alike to, so
  // that its like is reported once.
  void report_misuse(const std::string& text, std::string pair);

  // The same where the checker can say so from what it records: a read of bytes that were never
  // written, and a use of a block that a caching allocator has taken back. True when there was one.
  bool check_block(const Access& access, AccessKind kind, const ByteRange& range);
  bool check_written(const Access& access, AccessKind kind, const ByteRange& range);

  BlockTable& blocks() { return blocks_; }
  ObjectHistory& history() { return history_; }
  std::uint64_t next_order() { return ++order_; }

  // What is known of a range is known of the range of the same size at key from now on too.
  void copy_history(const ByteRange& range, Address key);

  // Forgets what happened to memory that goes back to the driver.
  void forget(Address address, std::size_t size_bytes);

  // Every hazard counts; texts are kept for the first kTextsMax distinct ones.
  std::size_t count() const { return count_; }
  std::size_t text_count() const { return texts_.size(); }
  const std::string& text(std::size_t index) const { return texts_[index]; }
  void clear_reports();

 private:
  static constexpr std::size_t kTextsMax = 1000;
  static constexpr std::size_t kNameCacheSize = 1024;

  struct CachedName {
    const char* given = nullptr;
    const char* interned = nullptr;
  };

  void add_report(std::string text, std::string pair);

  const HazardPolicy policy_;
  AccessMap accesses_;
  BlockTable blocks_;
  ObjectHistory history_;
  std::uint64_t order_ = 0;
  std::unordered_set<std::string> names_;
  std::vector<CachedName> name_cache_{kNameCacheSize};
  std::size_t count_ = 0;
  std::vector<std::string> texts_;
  std::unordered_set<std::string> reported_pairs_;
};

// Text of the hazard that this thread met last; "" before the first.
const char* last_hazard();

}  // namespace spillover::emulator
