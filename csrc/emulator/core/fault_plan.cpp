#include "emulator/core/fault_plan.hpp"

#include <algorithm>
#include <cctype>
#include <iterator>
#include <utility>

#include "emulator/core/fault_api.h"
#include "emulator/core/status.hpp"

namespace spillover::emulator {
namespace {

// More than a sweep ever looks at; a plan without end must not fill the memory.
constexpr std::size_t kFiredMax = 10000;

bool cut(std::string_view* text, std::string_view suffix) {
  if (!text->ends_with(suffix)) return false;
  text->remove_suffix(suffix.size());
  return true;
}

bool is_one_of(std::string_view name, const std::string_view* begin, const std::string_view* end) {
  return std::find(begin, end, name) != end;
}

// Functions of the driver, but for those that only describe an error.
bool is_driver_call(std::string_view name) {
  return name.size() > 2 && name.starts_with("cu") &&
         std::isupper(static_cast<unsigned char>(name[2])) != 0 && !name.starts_with("cuGetError");
}

// A well-mixed number in [0, 1) of three (splitmix64): the same call of the same plan fails in
// every run, whatever other threads do.
double chance(std::uint64_t seed, std::uint64_t rule, std::uint64_t call) {
  std::uint64_t x = seed + 0x9E3779B97F4A7C15ULL * (call + 1) + 0xD1B54A32D192ED03ULL * (rule + 1);
  x = (x ^ (x >> 30U)) * 0xBF58476D1CE4E5B9ULL;
  x = (x ^ (x >> 27U)) * 0x94D049BB133111EBULL;
  x ^= x >> 31U;
  return static_cast<double>(x >> 11U) * 0x1.0p-53;
}

// Out of memory where a function makes something; elsewhere an error that says nothing of the
// arguments, that every function may return, and that is not sticky.
CUresult plausible_error(std::string_view function) {
  static constexpr std::string_view kMakers[] = {"Alloc",  "Create",   "Reserve", "Register",
                                                 "Retain", "cuMemMap", "Load",    "Malloc"};
  const bool makes = std::any_of(std::begin(kMakers), std::end(kMakers), [&](auto part) {
    return function.find(part) != std::string_view::npos;
  });
  return makes && !works_before_failing(function) ? CUDA_ERROR_OUT_OF_MEMORY
                                                  : CUDA_ERROR_OPERATING_SYSTEM;
}

// One "name number" a line.
std::string lines_of(const std::map<std::string, std::uint64_t, std::less<>>& numbers) {
  std::string text;
  for (const auto& [name, number] : numbers) text += name + " " + std::to_string(number) + "\n";
  return text;
}

}  // namespace

std::string_view documented_name(std::string_view symbol) {
  if (!cut(&symbol, "_ptsz")) cut(&symbol, "_ptds");
  if (symbol.size() > 3 && symbol[symbol.size() - 3] == '_' && symbol[symbol.size() - 2] == 'v' &&
      std::isdigit(static_cast<unsigned char>(symbol.back())) != 0) {
    symbol.remove_suffix(3);
  }
  return symbol;
}

bool is_sticky_error(CUresult error) {
  switch (error) {
    case CUDA_ERROR_ECC_UNCORRECTABLE:
    case CUDA_ERROR_ILLEGAL_ADDRESS:
    case CUDA_ERROR_LAUNCH_TIMEOUT:
    case CUDA_ERROR_ASSERT:
    case CUDA_ERROR_HARDWARE_STACK_ERROR:
    case CUDA_ERROR_ILLEGAL_INSTRUCTION:
    case CUDA_ERROR_MISALIGNED_ADDRESS:
    case CUDA_ERROR_INVALID_ADDRESS_SPACE:
    case CUDA_ERROR_INVALID_PC:
    case CUDA_ERROR_LAUNCH_FAILED:
      return true;
    default:
      return false;
  }
}

bool works_before_failing(std::string_view function) {
  static constexpr std::string_view kParts[] = {"Free",        "Destroy",    "Release",
                                                "Unregister",  "Unmap",      "Unload",
                                                "Synchronize", "PopCurrent", "EndCapture"};
  // A query that fails is taken for an answer, so nothing hangs on its work.
  return std::any_of(std::begin(kParts), std::end(kParts),
                     [&](auto part) { return function.find(part) != std::string_view::npos; });
}

FaultPlan& FaultPlan::instance() {
  static auto& plan = *new FaultPlan;
  return plan;
}

void FaultPlan::begin(std::vector<Rule> rules, std::uint64_t seed) {
  const std::lock_guard<std::mutex> lock(mutex_);
  rules_ = std::move(rules);
  seed_ = seed;
  counts_.clear();
  bytes_.clear();
  driver_calls_ = 0;
  fired_.clear();
  is_active_ = true;
}

void FaultPlan::end() {
  const std::lock_guard<std::mutex> lock(mutex_);
  is_active_ = false;
}

bool FaultPlan::fires(std::size_t index, std::uint64_t call) {
  Rule& rule = rules_[index];
  if (call < rule.first_call || (rule.times != 0 && rule.fired >= rule.times)) return false;
  if (rule.probability < 1 && chance(seed_, index, call) >= rule.probability) return false;
  ++rule.fired;
  return true;
}

FaultPlan::Verdict FaultPlan::observe(const char* symbol) {
  const std::string_view name = documented_name(symbol);
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!is_active_) return {};
  auto position = counts_.find(name);
  if (position == counts_.end()) position = counts_.emplace(std::string(name), 0).first;
  const std::uint64_t call = ++position->second;
  const bool is_driver = is_driver_call(name);
  if (is_driver) ++driver_calls_;
  for (std::size_t i = 0; i < rules_.size(); ++i) {
    const bool is_any = rules_[i].function == "*";
    if (is_any ? !is_driver : rules_[i].function != name) continue;
    if (!fires(i, is_any ? driver_calls_ : call)) continue;
    const CUresult error =
        rules_[i].error != CUDA_SUCCESS ? rules_[i].error : plausible_error(name);
    if (fired_.size() < kFiredMax) fired_.push_back({std::string(name), call, error});
    const bool is_late =
        rules_[i].timing == SPILLOVER_EMULATOR_FAULT_AFTER ||
        (rules_[i].timing == SPILLOVER_EMULATOR_FAULT_DEFAULT && works_before_failing(name));
    return is_late ? Verdict{CUDA_SUCCESS, error} : Verdict{error, CUDA_SUCCESS};
  }
  return {};
}

void FaultPlan::add_bytes(const char* symbol, std::size_t size_bytes) {
  const std::string_view name = documented_name(symbol);
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!is_active_) return;
  auto position = bytes_.find(name);
  if (position == bytes_.end()) position = bytes_.emplace(std::string(name), 0).first;
  position->second += size_bytes;
}

std::string FaultPlan::counts() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return lines_of(counts_);
}

std::string FaultPlan::bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return lines_of(bytes_);
}

std::string FaultPlan::fired() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::string text;
  for (const Fired& fault : fired_) {
    const char* error = status_name(fault.error);
    text += fault.function + " " + std::to_string(fault.call) + " " +
            (error == nullptr ? std::to_string(static_cast<int>(fault.error)) : error) + "\n";
  }
  return text;
}

}  // namespace spillover::emulator
