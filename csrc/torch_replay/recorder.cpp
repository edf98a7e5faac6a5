// Writes the allocations and frees of this process to a file as they happen, in the csv form that
// spillover replay reads.
//
// One recorder a process, leaked on purpose: torch keeps a tracker until the process ends, so that
// it is attached once and looks at whether a file is open. Torch calls it with the lock of its
// allocator held, in the order of the events; the recorder's mutex is taken last of all, and no
// call of torch is made under it.
#include <c10/cuda/CUDACachingAllocator.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cinttypes>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <mutex>
#include <unordered_map>

#include "torch_replay/trace_file.hpp"

namespace spillover::torch_replay {
namespace {

// Five fields, of which none is a text.
constexpr std::size_t kLineBytesMax = 128;

using TraceEntry = c10::CachingDeviceAllocator::TraceEntry;

class Recorder {
 public:
  static Recorder& instance() {
    static auto& recorder = *new Recorder;
    return recorder;
  }

  // 0 or an errno. Blocks that are live already are written first.
  int start(const char* path, int device) {
    const auto snapshot = c10::cuda::CUDACachingAllocator::snapshot();
    attach();
    const std::lock_guard<std::mutex> lock(mutex_);
    if (file_.is_open()) return EBUSY;
    const int error = file_.open(path);
    if (error != 0) return error;
    device_ = device;
    live_.clear();
    next_id_ = 0;
    file_.append("op,id,bytes,stream,thread\n");
    for (const auto& segment : snapshot.segments) {
      if (segment.device != device) continue;
      std::size_t address = segment.address;
      for (const auto& block : segment.blocks) {
        if (block.allocated) write_alloc(address, block.requested_size, segment.stream);
        address += block.size;
      }
    }
    return 0;
  }

  // 0, or the errno of the first write that failed.
  int stop() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return file_.close();
  }

  void record_stream(std::size_t address, const void* stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = live_.find(address);
    if (!file_.is_open() || found == live_.end()) return;
    write("record_stream,%" PRIu64 ",,%#" PRIxPTR ",%ld\n", found->second,
          reinterpret_cast<std::uintptr_t>(stream), thread_id());
  }

 private:
  void attach() {
    static std::once_flag once;
    std::call_once(once, [this] {
      c10::cuda::CUDACachingAllocator::attachAllocatorTraceTracker(
          [this](const TraceEntry& entry) { on_entry(entry); });
    });
  }

  void on_entry(const TraceEntry& entry) {
    if (entry.action_ != TraceEntry::ALLOC && entry.action_ != TraceEntry::FREE_REQUESTED) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!file_.is_open() || entry.device_ != device_) return;
    if (entry.action_ == TraceEntry::ALLOC) {
      write_alloc(entry.addr_, entry.size_, entry.stream_);
      return;
    }
    const auto found = live_.find(entry.addr_);
    if (found == live_.end()) return;
    write("free,%" PRIu64 ",,,%ld\n", found->second, thread_id());
    live_.erase(found);
  }

  void write_alloc(std::size_t address, std::size_t size_bytes, const void* stream) {
    live_[address] = next_id_;
    write("alloc,%" PRIu64 ",%zu,%#" PRIxPTR ",%ld\n", next_id_++, size_bytes,
          reinterpret_cast<std::uintptr_t>(stream), thread_id());
  }

  void write(const char* format, ...) __attribute__((format(printf, 2, 3))) {
    std::array<char, kLineBytesMax> line;
    std::va_list arguments;
    va_start(arguments, format);
    const int length = std::vsnprintf(line.data(), line.size(), format, arguments);
    va_end(arguments);
    file_.append({line.data(), static_cast<std::size_t>(length)});
  }

  static long thread_id() {
    static thread_local const long id = ::syscall(SYS_gettid);
    return id;
  }

  std::mutex mutex_;
  // Guarded by mutex_.
  TraceFile file_;
  int device_ = 0;
  std::uint64_t next_id_ = 0;
  std::unordered_map<std::size_t, std::uint64_t> live_;  // address to id
};

}  // namespace
}  // namespace spillover::torch_replay

using spillover::torch_replay::Recorder;

extern "C" {

int spillover_torch_recorder_start(const char* path, int device) {
  return Recorder::instance().start(path, device);
}

int spillover_torch_recorder_stop() {
  return Recorder::instance().stop();
}

void spillover_torch_recorder_record_stream(uint64_t address, const void* stream) {
  Recorder::instance().record_stream(static_cast<std::size_t>(address), stream);
}

}  // extern "C"
