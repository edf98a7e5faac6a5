// The kernel's io_uring: a queue of requests to it and one of their results, by its system calls.
//
// One thread owns a ring: it makes it, uses it and destroys it. A forked child may only exit; the
// ring's memory is not there. At most entries requests may be under way, so that neither queue can
// overflow. PRIVATE to tiers/.
#pragma once

#include <sys/types.h>
#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>

#include "base/file_descriptor.hpp"
#include "tiers/transfer_progress.hpp"

namespace spillover {

namespace uring_abi {
struct SubmissionEntry;
}

class IoUring {
 public:
  // What a request is known by in its result.
  using Tag = uint64_t;

  struct Transfer {
    TransferDirection direction;
    int file;  // The registered one, where there is one.
    std::byte* data;
    uint32_t size_bytes;
    uint64_t offset;
    int buffer = -1;  // Of the registered ones, which data lies in; below zero for none.
  };

  struct Result {
    Tag tag;
    int32_t value;  // As of the system call, or an errno below zero.
  };

  // Throws StorageError where the kernel has no io_uring of 2020 (5.6), or forbids it.
  explicit IoUring(uint32_t entries);
  ~IoUring();
  IoUring(const IoUring&) = delete;
  IoUring& operator=(const IoUring&) = delete;

  // From then on every transfer is of this file. False where the kernel refuses.
  bool register_file(int file) noexcept;
  // All buffers at once, for good. Zero or an errno; with ENOMEM the limit on locked memory is too
  // small for all of them.
  int register_buffers(std::span<const iovec> buffers) noexcept;
  // A table of buffers which set_buffer() fills, of at most 1 GiB each. False before Linux 5.19.
  bool make_buffer_table(uint32_t count) noexcept;
  // Zero or an errno as above. An empty buffer takes back the one that is there; transfers of it
  // that are under way go on.
  int set_buffer(uint32_t index, iovec buffer) noexcept;

  // These queue a request; submit() hands it to the kernel.
  void add_transfer(const Transfer& transfer, Tag tag);
  void add_timeout(uint64_t delay_us, Tag tag);
  void add_poll(int file, Tag tag);  // Until the file is readable.
  size_t queued() const noexcept;

  // Hands over what is queued and has the kernel show what is over, which it does at no other time;
  // with Wait::kForOne it blocks until there is a result. Zero or an errno; what the kernel has not
  // taken then stays queued.
  enum class Wait { kNot, kForOne };
  int submit(Wait wait) noexcept;

  // Empty when there is none now.
  std::optional<Result> next_result() noexcept;

  // After submit() has failed for good: takes one back that is queued and not handed over.
  std::optional<Tag> take_back() noexcept;

 private:
  struct Memory;  // Shared with the kernel.

  uring_abi::SubmissionEntry& next_entry(uint8_t opcode, int file, Tag tag);
  long do_register(uint32_t what, const void* argument, size_t count) const noexcept;

  FileDescriptor ring_;
  std::unique_ptr<Memory> memory_;
  bool has_file_ = false;
};

}  // namespace spillover
