// How far an interprocess event has come, where other processes can see it.
//
// Each process keeps the marks of its events in one file; another process that opens an event maps
// that file (process_file.hpp, Note [Files between processes]).
//
// A mark counts its event's records, by whichever process, and the last one that is complete. A
// record that a process left behind when it ended counts as complete: its work is gone.
//
// Counters are atomic and shared between processes; objects are guarded by Machine::mutex, but for
// reached and publish, which any thread may call.
#pragma once

#include <cuda.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "emulator/core/process_file.hpp"

namespace spillover::emulator {

class SharedMark {
 public:
  // What an event's handle carries.
  struct Handle {
    ProcessFile file;
    std::uint32_t index = 0;
    std::uint32_t generation = 0;
  };

  // A mark of this process's; nullptr where the file has no place left.
  static std::shared_ptr<SharedMark> create();

  // One of another process. CUDA_ERROR_INVALID_HANDLE where it is gone.
  static CUresult open(const Handle& handle, std::shared_ptr<SharedMark>* mark);

  ~SharedMark();
  SharedMark(const SharedMark&) = delete;
  SharedMark& operator=(const SharedMark&) = delete;

  Handle handle() const;

  // Announces a record, whose number is returned; publish says that it is complete.
  std::uint64_t begin_record();
  void publish(std::uint64_t record);

  std::uint64_t records() const { return slot_->records.load(std::memory_order_acquire); }

  // Whether that record is complete.
  bool reached(std::uint64_t record) const;

 private:
  struct Slot {
    std::atomic<std::uint64_t> records;
    std::atomic<std::uint64_t> completed;
    std::atomic<std::uint32_t> generation;  // changes when the event is destroyed
    std::atomic<std::int32_t> recorder;     // process of the last record
    std::uint64_t unused[5];
  };
  static_assert(sizeof(Slot) == 64 && std::atomic<std::uint64_t>::is_always_lock_free);

  class File;

  SharedMark(std::shared_ptr<File> file, std::uint32_t index, bool is_own);
  static std::shared_ptr<File> own_file();

  std::shared_ptr<File> file_;
  const std::uint32_t index_;
  const bool is_own_;
  Slot* slot_;
};

}  // namespace spillover::emulator
