#include "emulator/aten/forward_lines.hpp"

#include <ATen/record_function.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "emulator/core/dry_api.h"

namespace spillover::emulator {
namespace {

// A number is one thread's own. An operator that makes no node leaves the number to the next one,
// which overwrites what was kept. A table of fixed size forgets the oldest nodes, which no backward
// pass waits for: a training step makes some thousands.
class ForwardLines {
 public:
  static ForwardLines& instance() {
    static auto* const lines = new ForwardLines();
    return *lines;
  }

  void note(uint64_t thread, uint64_t number, unsigned site) {
    const std::lock_guard<std::mutex> guard(mutex_);
    lines_[slot_of(thread, number)] = {thread, number, site};
  }

  unsigned find(uint64_t thread, uint64_t number) {
    const std::lock_guard<std::mutex> guard(mutex_);
    const Line& line = lines_[slot_of(thread, number)];
    return line.thread == thread && line.number == number ? line.site : 0;
  }

 private:
  struct Line {
    uint64_t thread = 0;
    uint64_t number = 0;
    unsigned site = 0;
  };

  static constexpr size_t kLines = size_t{1} << 18;

  // Consecutive numbers of one thread never collide before the table is full.
  static size_t slot_of(uint64_t thread, uint64_t number) {
    return (number + thread * 0x9E3779B97F4A7C15U) % kLines;
  }

  std::mutex mutex_;
  std::vector<Line> lines_{kLines};  // guarded by mutex_
};

std::unique_ptr<at::ObserverContext> note_operator(const at::RecordFunction& function) {
  const int64_t number = function.seqNr();
  if (number >= 0) {
    ForwardLines::instance().note(at::RecordFunction::currentThreadId(),
                                  static_cast<uint64_t>(number), spillover_emulator_take_site());
  }
  return nullptr;
}

}  // namespace

void follow_forward_lines() {
  at::addGlobalCallback(
      at::RecordFunctionCallback(&note_operator).scopes({at::RecordScope::FUNCTION}));
}

unsigned forward_site(const torch::autograd::Node& node) {
  return ForwardLines::instance().find(node.thread_id(), node.sequence_nr());
}

}  // namespace spillover::emulator
