#include "tiers/io_uring.hpp"

#include <poll.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <cstring>
#include <initializer_list>
#include <string>
#include <vector>

#include "base/check.hpp"
#include "base/error.hpp"
#include "tiers/io_uring_abi.hpp"

namespace spillover {

namespace {

using uring_abi::CompletionEntry;
using uring_abi::SubmissionEntry;
using uring_abi::Timespec;

// The kernel swaps the halves of the poll mask on other machines.
static_assert(std::endian::native == std::endian::little);

[[noreturn]] void throw_error(const std::string& call, int native_error, const char* hint = "") {
  throw StorageError("io_uring cannot be used: " + call + ": " + std::strerror(native_error) +
                         " (errno " + std::to_string(native_error) + ")" + hint,
                     "", native_error);
}

const char* hint_of(int native_error) {
  if (native_error == EPERM) return ", by seccomp or by the sysctl kernel.io_uring_disabled";
  if (native_error == ENOSYS) return ", it came with Linux 5.1";
  if (native_error == ENOMEM) return ", the limit on locked memory (ulimit -l) may be too small";
  return "";
}

// The fewest interruptions that this kernel can do: a result waits until its thread asks for it.
FileDescriptor set_up(uint32_t entries, uring_abi::Parameters* parameters) {
  using namespace uring_abi;
  int native_error = 0;
  for (const uint32_t flags : {kSetupSingleIssuer | kSetupDeferTaskRun, kSetupCoopTaskRun, 0U}) {
    *parameters = {};
    parameters->flags = flags | kSetupClamp;
    FileDescriptor ring(static_cast<int>(syscall(kSetupCall, entries, parameters)));
    if (ring.is_open()) return ring;
    native_error = errno;
    if (native_error != EINVAL) break;
  }
  throw_error("io_uring_setup", native_error, hint_of(native_error));
}

// Shared memory of the ring. A forked child does not get it: both would use the same queues.
class Mapping {
 public:
  Mapping(int ring, size_t size_bytes, int64_t offset) : size_bytes_(size_bytes) {
    address_ = mmap(nullptr, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring,
                    static_cast<off_t>(offset));
    if (address_ == MAP_FAILED) throw_error("mmap", errno);
    if (madvise(address_, size_bytes, MADV_DONTFORK) != 0) {
      const int native_error = errno;
      munmap(address_, size_bytes_);
      throw_error("madvise", native_error);
    }
  }
  ~Mapping() { munmap(address_, size_bytes_); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  template <typename T>
  T* at(uint32_t offset) const {
    return reinterpret_cast<T*>(static_cast<std::byte*>(address_) + offset);
  }

 private:
  void* address_;
  size_t size_bytes_;
};

size_t queue_bytes(const uring_abi::Parameters& parameters) {
  return std::max(parameters.sq_off.array + parameters.sq_entries * sizeof(uint32_t),
                  parameters.cq_off.entries + parameters.cq_entries * sizeof(CompletionEntry));
}

uint32_t load(uint32_t& shared) {
  return std::atomic_ref(shared).load(std::memory_order_acquire);
}

void store(uint32_t& shared, uint32_t value) {
  std::atomic_ref(shared).store(value, std::memory_order_release);
}

}  // namespace

struct IoUring::Memory {
  Memory(int ring, const uring_abi::Parameters& parameters)
      : queues(ring, queue_bytes(parameters), uring_abi::kRingOffset),
        entries_mapping(ring, parameters.sq_entries * sizeof(SubmissionEntry),
                        uring_abi::kEntriesOffset),
        entries(entries_mapping.at<SubmissionEntry>(0)),
        sq_head(*queues.at<uint32_t>(parameters.sq_off.head)),
        sq_tail(*queues.at<uint32_t>(parameters.sq_off.tail)),
        sq_count(parameters.sq_entries),
        results(queues.at<CompletionEntry>(parameters.cq_off.entries)),
        cq_head(*queues.at<uint32_t>(parameters.cq_off.head)),
        cq_tail(*queues.at<uint32_t>(parameters.cq_off.tail)),
        cq_mask(parameters.cq_entries - 1),
        delays(parameters.sq_entries) {
    // Entry i of the queue is always entry i of the array.
    auto* order = queues.at<uint32_t>(parameters.sq_off.array);
    for (uint32_t i = 0; i < sq_count; ++i) order[i] = i;
  }

  Mapping queues;
  Mapping entries_mapping;
  SubmissionEntry* entries;
  uint32_t& sq_head;  // The kernel's.
  uint32_t& sq_tail;  // Ours.
  const uint32_t sq_count;
  CompletionEntry* results;
  uint32_t& cq_head;  // Ours.
  uint32_t& cq_tail;  // The kernel's.
  const uint32_t cq_mask;
  std::vector<Timespec> delays;  // Read by the kernel when it takes the entry of that index.
};

IoUring::IoUring(uint32_t entries) {
  uring_abi::Parameters parameters;
  ring_ = set_up(entries, &parameters);
  constexpr uint32_t kNeeded = uring_abi::kFeatureSingleMap | uring_abi::kFeatureNoDrop |
                               uring_abi::kFeatureSubmitStable | uring_abi::kFeatureCurrentPosition;
  if ((parameters.features & kNeeded) != kNeeded) {
    throw StorageError("io_uring cannot be used: this kernel's is older than Linux 5.6", "",
                       ENOSYS);
  }
  memory_ = std::make_unique<Memory>(ring_.number(), parameters);
}

IoUring::~IoUring() = default;

long IoUring::do_register(uint32_t what, const void* argument, size_t count) const noexcept {
  return syscall(uring_abi::kRegisterCall, ring_.number(), what, argument,
                 static_cast<uint32_t>(count));
}

bool IoUring::register_file(int file) noexcept {
  has_file_ = do_register(uring_abi::kRegisterFiles, &file, 1) == 0;
  return has_file_;
}

int IoUring::register_buffers(std::span<const iovec> buffers) noexcept {
  const long result = do_register(uring_abi::kRegisterBuffers, buffers.data(), buffers.size());
  return result == 0 ? 0 : errno;
}

bool IoUring::make_buffer_table(uint32_t count) noexcept {
  uring_abi::BufferTable table{};
  table.count = count;
  table.flags = uring_abi::kRegisterSparse;
  return do_register(uring_abi::kRegisterBuffers2, &table, sizeof table) == 0;
}

int IoUring::set_buffer(uint32_t index, iovec buffer) noexcept {
  uint64_t tag = 0;
  uring_abi::BufferUpdate update{};
  update.first = index;
  update.buffers = reinterpret_cast<uintptr_t>(&buffer);
  update.tags = reinterpret_cast<uintptr_t>(&tag);
  update.count = 1;
  const long done = do_register(uring_abi::kRegisterBuffersUpdate, &update, sizeof update);
  return done == 1 ? 0 : errno;
}

SubmissionEntry& IoUring::next_entry(uint8_t opcode, int file, Tag tag) {
  SPILLOVER_CHECK(queued() < memory_->sq_count, "more requests than the ring has room for");
  SubmissionEntry& entry = memory_->entries[memory_->sq_tail & (memory_->sq_count - 1)];
  entry = {};
  entry.opcode = opcode;
  entry.file = file;
  entry.user_data = tag;
  return entry;
}

void IoUring::add_transfer(const Transfer& transfer, Tag tag) {
  using namespace uring_abi;
  const bool is_write = transfer.direction == TransferDirection::kWrite;
  const bool is_fixed = transfer.buffer >= 0;
  const uint8_t opcode = is_fixed   ? (is_write ? kWriteFixed : kReadFixed)
                         : is_write ? kWrite
                                    : kRead;
  SubmissionEntry& entry = next_entry(opcode, has_file_ ? 0 : transfer.file, tag);
  entry.flags = has_file_ ? kFixedFile : 0;
  entry.offset = transfer.offset;
  entry.address = reinterpret_cast<uintptr_t>(transfer.data);
  entry.length = transfer.size_bytes;
  if (is_fixed) entry.buffer_index = static_cast<uint16_t>(transfer.buffer);
  store(memory_->sq_tail, memory_->sq_tail + 1);
}

void IoUring::add_timeout(uint64_t delay_us, Tag tag) {
  SubmissionEntry& entry = next_entry(uring_abi::kTimeout, -1, tag);
  Timespec& delay = memory_->delays[memory_->sq_tail & (memory_->sq_count - 1)];
  delay.seconds = static_cast<int64_t>(delay_us / 1'000'000);
  delay.nanoseconds = static_cast<int64_t>(delay_us % 1'000'000) * 1000;
  entry.address = reinterpret_cast<uintptr_t>(&delay);
  entry.length = 1;
  store(memory_->sq_tail, memory_->sq_tail + 1);
}

void IoUring::add_poll(int file, Tag tag) {
  next_entry(uring_abi::kPollAdd, file, tag).operation_flags = POLLIN;
  store(memory_->sq_tail, memory_->sq_tail + 1);
}

size_t IoUring::queued() const noexcept {
  return memory_->sq_tail - load(memory_->sq_head);
}

int IoUring::submit(Wait wait) noexcept {
  for (;;) {
    const size_t before = queued();
    const long taken =
        syscall(uring_abi::kEnterCall, ring_.number(), static_cast<uint32_t>(before),
                wait == Wait::kForOne ? 1U : 0U, uring_abi::kEnterGetEvents, nullptr, size_t{0});
    if (taken < 0) return errno;
    if (taken == 0 && before > 0) return EAGAIN;
    // It stops behind a request that it cannot begin, whose result then says so.
    if (static_cast<size_t>(taken) >= before) return 0;
  }
}

std::optional<IoUring::Result> IoUring::next_result() noexcept {
  const uint32_t head = memory_->cq_head;
  if (head == load(memory_->cq_tail)) return std::nullopt;
  const CompletionEntry& entry = memory_->results[head & memory_->cq_mask];
  const Result result{entry.user_data, entry.result};
  store(memory_->cq_head, head + 1);
  return result;
}

std::optional<IoUring::Tag> IoUring::take_back() noexcept {
  if (queued() == 0) return std::nullopt;
  store(memory_->sq_tail, memory_->sq_tail - 1);
  return memory_->entries[memory_->sq_tail & (memory_->sq_count - 1)].user_data;
}

}  // namespace spillover
