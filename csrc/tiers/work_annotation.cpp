#include "tiers/work_annotation.hpp"

#include "base/emulator_symbol.hpp"

namespace spillover {
namespace {

template <typename Function>
Function* find(const char* name) {
  return reinterpret_cast<Function*>(find_emulator_symbol(name));
}

// The part of the emulator's C interface that is used here, declared again because the product
// shares no header with the emulator.
struct Clock {
  uint64_t (*submit)(const char*, size_t) =
      find<uint64_t(const char*, size_t)>("spillover_emulator_work_submit");
  void (*begin)(uint64_t) = find<void(uint64_t)>("spillover_emulator_work_begin");
  void (*end)(uint64_t) = find<void(uint64_t)>("spillover_emulator_work_end");
  void (*wait)(uint64_t) = find<void(uint64_t)>("spillover_emulator_work_wait");
  int (*is_done)(uint64_t) = find<int(uint64_t)>("spillover_emulator_work_is_done");
};

const Clock& clock() {
  static const Clock found;
  return found;
}

}  // namespace

WorkId annotate_work_begin(const char* resource, size_t size_bytes) noexcept {
  const WorkId work = annotate_work_submit(resource, size_bytes);
  if (work != 0) clock().begin(work);
  return work;
}

void annotate_work_end(WorkId work) noexcept {
  if (work == 0) return;
  clock().end(work);
  clock().wait(work);
}

WorkId annotate_work_submit(const char* resource, size_t size_bytes) noexcept {
  return clock().submit != nullptr ? clock().submit(resource, size_bytes) : 0;
}

void annotate_work_waits(WorkId work) noexcept {
  if (work != 0) clock().begin(work);
}

void annotate_work_done(WorkId work) noexcept {
  if (work != 0) clock().end(work);
}

void annotate_work_wait(WorkId work) noexcept {
  if (work != 0) clock().wait(work);
}

bool annotate_work_is_done(WorkId work) noexcept {
  return work == 0 || clock().is_done(work) != 0;
}

}  // namespace spillover
