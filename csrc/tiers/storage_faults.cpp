#include "tiers/storage_faults.hpp"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string_view>
#include <thread>
#include <utility>

#include "base/bytes.hpp"
#include "base/error.hpp"
#include "tiers/extent_space.hpp"

namespace spillover {
namespace {

constexpr std::array<std::string_view, 11> kOperations = {
    "make_folder", "open",     "unlink", "list", "rename", "lock",
    "allocate",    "truncate", "sync",   "read", "write"};

// Short transfers end on a sector of the disk, which need not be a block of ours.
constexpr size_t kSectorBytes = 512;

constexpr size_t kFiredMax = 10000;

struct Free {
  void operator()(void* pointer) const { std::free(pointer); }
};
using AlignedBytes = std::unique_ptr<std::byte, Free>;

// splitmix64 of three numbers: the same call of the same plan gives the same in every run.
uint64_t mix(uint64_t seed, uint64_t rule, uint64_t call) {
  uint64_t x = seed + 0x9E3779B97F4A7C15ULL * (call + 1) + 0xD1B54A32D192ED03ULL * (rule + 1);
  x = (x ^ (x >> 30U)) * 0xBF58476D1CE4E5B9ULL;
  x = (x ^ (x >> 27U)) * 0x94D049BB133111EBULL;
  return x ^ (x >> 31U);
}

std::string describe(const StorageFault& fault) {
  switch (fault.kind) {
    case StorageFaultKind::kError:
      return "errno " + std::to_string(fault.native_error);
    case StorageFaultKind::kShort:
      return "short";
    case StorageFaultKind::kFlip:
      return "flip";
    case StorageFaultKind::kTorn:
      return "torn";
    case StorageFaultKind::kDelay:
      return "delay";
  }
  return "";
}

void check(const StorageFault& fault) {
  if (std::find(kOperations.begin(), kOperations.end(), fault.operation) == kOperations.end()) {
    throw ConfigError("there is no file operation " + fault.operation);
  }
  const bool is_write = fault.operation == "write";
  const bool is_transfer = is_write || fault.operation == "read";
  const bool fits = fault.kind == StorageFaultKind::kError ||
                    fault.kind == StorageFaultKind::kDelay ||
                    (fault.kind == StorageFaultKind::kTorn ? is_write : is_transfer);
  if (!fits) throw ConfigError(fault.operation + " cannot have the fault " + describe(fault));
  if (!fault.folder.empty() && !is_transfer && fault.operation != "allocate" &&
      fault.operation != "truncate" && fault.operation != "sync" && fault.operation != "lock") {
    throw ConfigError(fault.operation + " has no file, so folder cannot choose among its calls");
  }
  if (fault.kind == StorageFaultKind::kError && fault.native_error <= 0) {
    throw ConfigError("an error has an errno above 0, not " + std::to_string(fault.native_error));
  }
}

// About half, on a sector; never nothing, which would mean the end of the file.
size_t shortened(size_t size_bytes) {
  const size_t half = round_down(size_bytes / 2 + kSectorBytes, kSectorBytes);
  return std::min(std::max(half, kSectorBytes), size_bytes);
}

// By the name that the file had; one without a name is shown in its folder all the same.
bool is_in(const std::string& folder, int file) {
  std::array<char, 4096> path{};
  const std::string link = "/proc/self/fd/" + std::to_string(file);
  const ssize_t length = readlink(link.c_str(), path.data(), path.size());
  const std::string_view found(path.data(), length > 0 ? static_cast<size_t>(length) : 0);
  return found.substr(0, found.rfind('/')) == folder;
}

void flip_bit(std::byte* data, size_t size_bytes, uint64_t random) {
  data[(random >> 3U) % size_bytes] ^= std::byte{1} << (random & 7U);
}

class FaultyTransfer : public TransferPlan {
 public:
  FaultyTransfer(const StorageFaultOutcome& outcome, std::byte* data, size_t size_bytes)
      : TransferPlan(data, size_bytes), outcome_(outcome), asked_bytes_(size_bytes) {
    delay_us = outcome.delay_us;
    native_error = outcome.native_error;
  }

 protected:
  const StorageFaultOutcome outcome_;
  const size_t asked_bytes_;
};

class FaultyRead : public FaultyTransfer {
 public:
  using FaultyTransfer::FaultyTransfer;

  ssize_t finish(ssize_t result) noexcept override {
    if (result <= 0) return result;
    const auto read_bytes = static_cast<size_t>(result);
    if (outcome_.is_flipped) flip_bit(data, read_bytes, outcome_.random);
    if (!outcome_.is_short) return result;
    const size_t kept_bytes = shortened(read_bytes);
    std::memset(data + kept_bytes, 0xFF, read_bytes - kept_bytes);
    return static_cast<ssize_t>(kept_bytes);
  }
};

class FaultyWrite : public FaultyTransfer {
 public:
  FaultyWrite(const StorageFaultOutcome& outcome, std::byte* asked_data, size_t asked_bytes)
      : FaultyTransfer(outcome, asked_data, asked_bytes) {
    if (outcome.is_flipped) flip();
    if (outcome.is_short || outcome.is_torn) size_bytes = shortened(asked_bytes);
  }

  ssize_t finish(ssize_t result) noexcept override {
    return outcome_.is_torn && result > 0 ? static_cast<ssize_t>(asked_bytes_) : result;
  }

 private:
  // The caller's memory stays as it is.
  void flip() {
    changed_.reset(static_cast<std::byte*>(
        std::aligned_alloc(kDiskBlockBytes, round_up(asked_bytes_, kDiskBlockBytes))));
    if (changed_ == nullptr) {
      native_error = ENOMEM;
      return;
    }
    std::memcpy(changed_.get(), data, asked_bytes_);
    flip_bit(changed_.get(), asked_bytes_, outcome_.random);
    data = changed_.get();
  }

  AlignedBytes changed_;
};

}  // namespace

StorageFaults& StorageFaults::instance() {
  static auto& faults = *new StorageFaults;
  return faults;
}

void StorageFaults::begin(std::vector<StorageFault> plan, uint64_t seed) {
  std::vector<Rule> rules;
  for (StorageFault& fault : plan) {
    check(fault);
    rules.push_back({std::move(fault)});
  }
  const std::lock_guard lock(mutex_);
  rules_ = std::move(rules);
  seed_ = seed;
  calls_.clear();
  fired_.clear();
  is_active_ = true;
  replace_file_operations(this);
}

void StorageFaults::end() {
  const std::lock_guard lock(mutex_);
  replace_file_operations(nullptr);
  is_active_ = false;
}

std::map<std::string, uint64_t> StorageFaults::calls() const {
  const std::lock_guard lock(mutex_);
  return calls_;
}

std::vector<std::string> StorageFaults::fired() const {
  const std::lock_guard lock(mutex_);
  return fired_;
}

StorageFaultOutcome StorageFaults::next_call(const char* operation, int file) {
  StorageFaultOutcome outcome;
  const std::lock_guard lock(mutex_);
  if (!is_active_) return outcome;
  const uint64_t call = ++calls_[operation];
  for (size_t i = 0; i < rules_.size(); ++i) {
    Rule& rule = rules_[i];
    const StorageFault& fault = rule.fault;
    if (fault.operation != operation || call < fault.first_call) continue;
    if (!fault.folder.empty() && !is_in(fault.folder, file)) continue;
    if (fault.times != 0 && rule.fired >= fault.times) continue;
    const uint64_t random = mix(seed_, i, call);
    if (static_cast<double>(random >> 11U) * 0x1.0p-53 >= fault.probability) continue;
    ++rule.fired;
    if (fired_.size() < kFiredMax) {
      fired_.push_back(fault.operation + " " + std::to_string(call) + ": " + describe(fault));
    }
    outcome.random = mix(random, i, call);
    if (fault.kind == StorageFaultKind::kError) outcome.native_error = fault.native_error;
    if (fault.kind == StorageFaultKind::kShort) outcome.is_short = true;
    if (fault.kind == StorageFaultKind::kTorn) outcome.is_torn = true;
    if (fault.kind == StorageFaultKind::kFlip) outcome.is_flipped = true;
    if (fault.kind == StorageFaultKind::kDelay) outcome.delay_us += fault.delay_us;
  }
  return outcome;
}

template <typename Body>
int StorageFaults::run(const char* operation, int file, Body&& body) {
  const StorageFaultOutcome outcome = next_call(operation, file);
  std::this_thread::sleep_for(std::chrono::microseconds(outcome.delay_us));
  if (outcome.native_error == 0) return body();
  errno = outcome.native_error;
  return -1;
}

int StorageFaults::make_folder(const char* path, mode_t mode) {
  return run("make_folder", -1, [&] { return FileOperations::make_folder(path, mode); });
}

int StorageFaults::open(int folder, const char* name, int flags, mode_t mode) {
  return run("open", -1, [&] { return FileOperations::open(folder, name, flags, mode); });
}

int StorageFaults::unlink(int folder, const char* name) {
  return run("unlink", -1, [&] { return FileOperations::unlink(folder, name); });
}

int StorageFaults::list(int folder, std::vector<std::string>& names) {
  return run("list", -1, [&] { return FileOperations::list(folder, names); });
}

int StorageFaults::rename(int folder, const char* name, const char* new_name) {
  return run("rename", -1, [&] { return FileOperations::rename(folder, name, new_name); });
}

int StorageFaults::lock(int file) {
  return run("lock", file, [&] { return FileOperations::lock(file); });
}

int StorageFaults::allocate(int file, uint64_t offset, uint64_t size_bytes) {
  return run("allocate", file, [&] { return FileOperations::allocate(file, offset, size_bytes); });
}

int StorageFaults::truncate(int file, uint64_t size_bytes) {
  return run("truncate", file, [&] { return FileOperations::truncate(file, size_bytes); });
}

int StorageFaults::sync(int file, SyncKind kind) {
  return run("sync", file, [&] { return FileOperations::sync(file, kind); });
}

std::unique_ptr<TransferPlan> StorageFaults::plan(int file, TransferDirection direction,
                                                  std::byte* data, size_t size_bytes,
                                                  uint64_t /*offset*/) {
  const bool is_write = direction == TransferDirection::kWrite;
  const StorageFaultOutcome outcome = next_call(is_write ? "write" : "read", file);
  std::unique_ptr<TransferPlan> plan;
  if (is_write) {
    plan = std::make_unique<FaultyWrite>(outcome, data, size_bytes);
  } else {
    plan = std::make_unique<FaultyRead>(outcome, data, size_bytes);
  }
  return plan;
}

}  // namespace spillover
