#include "emulator/core/shared_mark.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <vector>

namespace spillover::emulator {
namespace {

// torch keeps at most 1,000 interprocess events alive.
constexpr std::size_t kFileBytes = std::size_t{1} << 20;
constexpr std::uint32_t kMarksMax = kFileBytes / 64;

}  // namespace

// A mapped file of marks. One of this process's own knows which places are free.
class SharedMark::File {
 public:
  explicit File(int file) : file_(file), place_(describe_file(file)) {
    void* memory = mmap(nullptr, kFileBytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (memory != MAP_FAILED) slots_ = static_cast<Slot*>(memory);
  }
  ~File() {
    if (slots_ != nullptr) munmap(slots_, kFileBytes);
    close(file_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  bool is_mapped() const { return slots_ != nullptr; }
  Slot* slot(std::uint32_t index) { return slots_ + index; }
  const ProcessFile& place() const { return place_; }

  bool take(std::uint32_t* index) {
    if (free_.empty() && used_ == kMarksMax) return false;
    if (free_.empty()) {
      *index = used_++;
    } else {
      *index = free_.back();
      free_.pop_back();
    }
    return true;
  }
  void give(std::uint32_t index) { free_.push_back(index); }

 private:
  const int file_;
  const ProcessFile place_;
  Slot* slots_ = nullptr;
  std::uint32_t used_ = 0;
  std::vector<std::uint32_t> free_;
};

SharedMark::SharedMark(std::shared_ptr<File> file, std::uint32_t index, bool is_own)
    : file_(std::move(file)), index_(index), is_own_(is_own), slot_(file_->slot(index)) {}

SharedMark::~SharedMark() {
  if (!is_own_) return;
  slot_->generation.fetch_add(1, std::memory_order_release);
  file_->give(index_);
}

std::shared_ptr<SharedMark::File> SharedMark::own_file() {
  static std::shared_ptr<File>* const instance = [] {  // leaked: events outlive static destructors
    const int file = open_memory_file("spillover-emulator-events", kFileBytes);
    if (file < 0) return new std::shared_ptr<File>();
    auto opened = std::make_shared<File>(file);
    return new std::shared_ptr<File>(opened->is_mapped() ? opened : nullptr);
  }();
  return *instance;
}

std::shared_ptr<SharedMark> SharedMark::create() {
  const std::shared_ptr<File> file = own_file();
  std::uint32_t index = 0;
  if (file == nullptr || !file->take(&index)) return nullptr;
  // Counters go on where the place's last event left them: a process may wait for that one still.
  std::shared_ptr<SharedMark> mark(new SharedMark(file, index, /*is_own=*/true));
  mark->publish(mark->records());
  return mark;
}

CUresult SharedMark::open(const Handle& handle, std::shared_ptr<SharedMark>* mark) {
  const int opened = open_process_file(handle.file);
  if (opened < 0 || handle.index >= kMarksMax) return CUDA_ERROR_INVALID_HANDLE;
  auto file = std::make_shared<File>(opened);
  if (!file->is_mapped()) return CUDA_ERROR_MAP_FAILED;
  if (file->slot(handle.index)->generation.load(std::memory_order_acquire) != handle.generation) {
    return CUDA_ERROR_INVALID_HANDLE;  // the event was destroyed
  }
  mark->reset(new SharedMark(std::move(file), handle.index, /*is_own=*/false));
  return CUDA_SUCCESS;
}

SharedMark::Handle SharedMark::handle() const {
  return {file_->place(), index_, slot_->generation.load(std::memory_order_acquire)};
}

std::uint64_t SharedMark::begin_record() {
  slot_->recorder.store(getpid(), std::memory_order_release);
  return slot_->records.fetch_add(1, std::memory_order_acq_rel) + 1;
}

void SharedMark::publish(std::uint64_t record) {
  std::uint64_t known = slot_->completed.load(std::memory_order_relaxed);
  while (known < record &&
         !slot_->completed.compare_exchange_weak(known, record, std::memory_order_acq_rel)) {
  }
}

bool SharedMark::reached(std::uint64_t record) const {
  return slot_->completed.load(std::memory_order_acquire) >= record ||
         !process_runs(slot_->recorder.load(std::memory_order_acquire));
}

}  // namespace spillover::emulator
