// File operations that fail as a seeded plan says: errors, short transfers, flipped bits, torn
// blocks, latency. For tests of whatever stores data through tiers/ (spillover.emulator.faults()).
//
// One object a process, leaked on purpose. Thread-safe; the mutex is held over no system call.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "tiers/file_operations.hpp"

namespace spillover {

enum class StorageFaultKind {
  kError,  // The operation has no effect and fails with native_error.
  kShort,  // A transfer moves about half of its bytes and says so.
  kFlip,   // A transfer flips one bit on its way and reports success.
  kTorn,   // A write reports success, but its second half never reaches the disk.
  kDelay,  // The operation takes delay_us longer.
};

struct StorageFault {
  std::string operation;  // A FileOperations method, or the direction of a transfer.
  StorageFaultKind kind = StorageFaultKind::kError;
  int native_error = 0;
  uint64_t first_call = 1;  // Calls of the operation count from 1 since the plan began.
  uint64_t times = 1;       // How many calls fail at most; 0: without end.
  double probability = 1;   // Of each call from first_call on.
  uint64_t delay_us = 0;
  // Strikes files in this folder only, which must be an absolute path without links; empty: all
  // files. For operations that have a file.
  std::string folder;
};

// What happens to one call; more than one fault can.
struct StorageFaultOutcome {
  int native_error = 0;
  bool is_short = false;
  bool is_torn = false;
  bool is_flipped = false;
  uint64_t random = 0;  // Chooses the bit.
  uint64_t delay_us = 0;
};

class StorageFaults : public FileOperations {
 public:
  static StorageFaults& instance();

  // Puts the plan into effect, in place of an earlier one, with counts from zero. Throws
  // ConfigError for an operation that does not exist, or a kind that the operation cannot have.
  void begin(std::vector<StorageFault> plan, uint64_t seed);
  // Puts the system back. Counts and what was fired stay until the next plan begins.
  void end();

  std::map<std::string, uint64_t> calls() const;
  // "write 3: errno 5" and the like, in the order of injection.
  std::vector<std::string> fired() const;

  int make_folder(const char* path, mode_t mode) override;
  int open(int folder, const char* name, int flags, mode_t mode) override;
  int unlink(int folder, const char* name) override;
  int list(int folder, std::vector<std::string>& names) override;
  int rename(int folder, const char* name, const char* new_name) override;
  int lock(int file) override;
  int allocate(int file, uint64_t offset, uint64_t size_bytes) override;
  int truncate(int file, uint64_t size_bytes) override;
  int sync(int file, SyncKind kind) override;
  std::unique_ptr<TransferPlan> plan(int file, TransferDirection direction, std::byte* data,
                                     size_t size_bytes, uint64_t offset) override;

 private:
  struct Rule {
    StorageFault fault;
    uint64_t fired = 0;
  };
  StorageFaultOutcome next_call(const char* operation, int file = -1);
  // Runs body unless the call fails; for operations that transfer nothing.
  template <typename Body>
  int run(const char* operation, int file, Body&& body);

  mutable std::mutex mutex_;
  bool is_active_ = false;
  uint64_t seed_ = 0;
  std::vector<Rule> rules_;
  std::map<std::string, uint64_t> calls_;
  std::vector<std::string> fired_;
};

}  // namespace spillover
