// Turns objects into opaque handles and back, so that a handle that a program made up, or kept too
// long, is an error and is never dereferenced.
//
// Guarded by Machine::mutex.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace spillover::emulator {

// Whether the handle of a destroyed object may be issued again.
enum class HandleReuse {
  kNever,
  kAtOnce,  // as CUDA does with streams; code that keys on a handle alone has to survive it
};

// Handles are tag (bits 56-62), generation (28-55), index (4-27) and 4 zero bits: like pointers
// they are aligned and not negative, which torch relies on, and larger than the special handles 0,
// 1 and 2. A slot whose generations are used up is left alone for ever.
template <typename Object>
class HandleTable {
 public:
  HandleTable(std::uint8_t tag, HandleReuse reuse) : tag_(tag), reuse_(reuse) {}

  template <typename Handle>
  void insert(Object object, Handle* handle) {
    std::size_t index = slots_.size();
    if (free_.empty()) {
      slots_.emplace_back();
    } else {
      index = free_.back();
      free_.pop_back();
    }
    slots_[index].object = std::move(object);
    slots_[index].live = true;
    ++size_;
    *handle = reinterpret_cast<Handle>(encode(index));
  }

  // nullptr for a handle that is not live.
  Object* find(const void* handle) {
    const auto value = reinterpret_cast<std::uintptr_t>(handle);
    const std::size_t index = (value >> kIndexShift) & kIndexMask;
    if (index >= slots_.size() || !slots_[index].live || value != encode(index)) return nullptr;
    return &slots_[index].object;
  }

  // The handle must be live. Returns the object, so that the caller decides when it dies.
  Object erase(const void* handle) {
    const std::size_t index =
        (reinterpret_cast<std::uintptr_t>(handle) >> kIndexShift) & kIndexMask;
    Slot& slot = slots_[index];
    slot.live = false;
    if (reuse_ == HandleReuse::kNever) ++slot.generation;
    if (slot.generation <= kGenerationMax) free_.push_back(index);
    --size_;
    return std::exchange(slot.object, Object{});
  }

  std::size_t size() const { return size_; }

  template <typename Function>
  void for_each(Function&& function) const {
    for (const Slot& slot : slots_) {
      if (slot.live) function(slot.object);
    }
  }

 private:
  struct Slot {
    Object object{};
    std::uint32_t generation = 0;
    bool live = false;
  };

  static constexpr unsigned kIndexShift = 4;
  static constexpr std::uintptr_t kIndexMask = (std::uintptr_t{1} << 24) - 1;
  static constexpr unsigned kGenerationShift = 28;
  static constexpr std::uint32_t kGenerationMax = (std::uint32_t{1} << 28) - 1;
  static constexpr unsigned kTagShift = 56;

  std::uintptr_t encode(std::size_t index) const {
    return std::uintptr_t{tag_} << kTagShift |
           std::uintptr_t{slots_[index].generation} << kGenerationShift |
           static_cast<std::uintptr_t>(index) << kIndexShift;
  }

  const std::uint8_t tag_;
  const HandleReuse reuse_;
  std::vector<Slot> slots_;
  std::vector<std::size_t> free_;
  std::size_t size_ = 0;
};

}  // namespace spillover::emulator
