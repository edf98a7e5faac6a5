// What we use of the kernel's io_uring interface, since the headers that we are compiled with may
// be older than the kernel that we run on, or lack it.
//
// Source: include/uapi/linux/io_uring.h of Linux 6.1 (GPL-2.0 WITH Linux-syscall-note, or MIT),
// whose numbers and layouts never change. PRIVATE to io_uring.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

namespace spillover::uring_abi {

// The same on every architecture that has CUDA.
inline constexpr long kSetupCall = 425;
inline constexpr long kEnterCall = 426;
inline constexpr long kRegisterCall = 427;

// Flags of setup, with the kernel that brought them.
inline constexpr uint32_t kSetupClamp = 1U << 4U;          // 5.6
inline constexpr uint32_t kSetupCoopTaskRun = 1U << 8U;    // 5.19
inline constexpr uint32_t kSetupSingleIssuer = 1U << 12U;  // 6.0
inline constexpr uint32_t kSetupDeferTaskRun = 1U << 13U;  // 6.1

// Features that setup reports.
inline constexpr uint32_t kFeatureSingleMap = 1U << 0U;        // 5.4
inline constexpr uint32_t kFeatureNoDrop = 1U << 1U;           // 5.5
inline constexpr uint32_t kFeatureSubmitStable = 1U << 2U;     // 5.5
inline constexpr uint32_t kFeatureCurrentPosition = 1U << 3U;  // 5.6, as the READ and WRITE codes

inline constexpr uint32_t kEnterGetEvents = 1U << 0U;

inline constexpr uint32_t kRegisterBuffers = 0;
inline constexpr uint32_t kRegisterFiles = 2;
inline constexpr uint32_t kRegisterBuffers2 = 15;       // 5.13
inline constexpr uint32_t kRegisterBuffersUpdate = 16;  // 5.13

inline constexpr uint32_t kRegisterSparse = 1U << 0U;  // A flag of kRegisterBuffers2; 5.19

inline constexpr uint8_t kReadFixed = 4;
inline constexpr uint8_t kWriteFixed = 5;
inline constexpr uint8_t kPollAdd = 6;
inline constexpr uint8_t kTimeout = 11;
inline constexpr uint8_t kRead = 22;
inline constexpr uint8_t kWrite = 23;

inline constexpr uint8_t kFixedFile = 1U << 0U;  // A flag of an entry.

inline constexpr int64_t kRingOffset = 0;
inline constexpr int64_t kEntriesOffset = 0x10000000;

struct SubmissionOffsets {
  uint32_t head, tail, ring_mask, ring_entries, flags, dropped, array, reserved1;
  uint64_t reserved2;
};

struct CompletionOffsets {
  uint32_t head, tail, ring_mask, ring_entries, overflow, entries, flags, reserved1;
  uint64_t reserved2;
};

struct Parameters {
  uint32_t sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle, features, wq_fd;
  uint32_t reserved[3];
  SubmissionOffsets sq_off;
  CompletionOffsets cq_off;
};

struct SubmissionEntry {
  uint8_t opcode;
  uint8_t flags;
  uint16_t priority;
  int32_t file;
  uint64_t offset;
  uint64_t address;
  uint32_t length;
  uint32_t operation_flags;
  uint64_t user_data;
  uint16_t buffer_index;
  uint16_t personality;
  int32_t splice_file;
  uint64_t reserved[2];
};

struct CompletionEntry {
  uint64_t user_data;
  int32_t result;
  uint32_t flags;
};

// Argument of kRegisterBuffers2.
struct BufferTable {
  uint32_t count;
  uint32_t flags;
  uint64_t reserved;
  uint64_t buffers;
  uint64_t tags;
};

// Argument of kRegisterBuffersUpdate.
struct BufferUpdate {
  uint32_t first;
  uint32_t reserved1;
  uint64_t buffers;
  uint64_t tags;
  uint32_t count;
  uint32_t reserved2;
};

struct Timespec {
  int64_t seconds;
  int64_t nanoseconds;
};

static_assert(sizeof(Parameters) == 120);
static_assert(sizeof(SubmissionEntry) == 64);
static_assert(offsetof(SubmissionEntry, user_data) == 32);
static_assert(sizeof(CompletionEntry) == 16);
static_assert(sizeof(BufferTable) == 32);
static_assert(sizeof(BufferUpdate) == 32);

}  // namespace spillover::uring_abi
