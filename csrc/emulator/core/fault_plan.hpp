// Counts API calls and decides which of them fail. Knows nothing of the Machine, so that calls
// before cuInit count too.
//
// One object a process, leaked on purpose. Thread-safe through a mutex of its own, which is taken
// last of all and held over no call. Never used in a forked child.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

namespace spillover::emulator {

// "cuMemAlloc" of "cuMemAlloc_v2_ptsz": the name that CUDA documents.
std::string_view documented_name(std::string_view symbol);

// Whether CUDA refuses all further work on the device after this error.
bool is_sticky_error(CUresult error);

// Whether a failing call of this function did its work: functions that release or wait return
// errors of earlier work, and CUDA offers no way to repeat them.
bool works_before_failing(std::string_view function);

class FaultPlan {
 public:
  struct Rule {
    std::string function;  // "*" for any function of the driver
    std::uint64_t first_call = 1;
    std::uint64_t times = 1;  // 0: without end
    double probability = 1;
    CUresult error = CUDA_SUCCESS;  // CUDA_SUCCESS: plausible_error()
    int timing = 0;                 // SPILLOVER_EMULATOR_FAULT_*
    std::uint64_t fired = 0;        // how many calls this rule has made fail
  };

  // What a call shall do: fail at once, or do its work and fail then.
  struct Verdict {
    CUresult at_once = CUDA_SUCCESS;
    CUresult late = CUDA_SUCCESS;
  };

  static FaultPlan& instance();

  void begin(std::vector<Rule> rules, std::uint64_t seed);
  void end();
  Verdict observe(const char* name);
  void add_bytes(const char* name, std::size_t size_bytes);

  std::string counts() const;
  std::string bytes() const;
  std::string fired() const;

 private:
  struct Fired {
    std::string function;
    std::uint64_t call;
    CUresult error;
  };

  bool fires(std::size_t index, std::uint64_t call);

  mutable std::mutex mutex_;
  bool is_active_ = false;
  std::uint64_t seed_ = 0;
  std::vector<Rule> rules_;
  std::map<std::string, std::uint64_t, std::less<>> counts_;
  std::map<std::string, std::uint64_t, std::less<>> bytes_;
  std::uint64_t driver_calls_ = 0;
  std::vector<Fired> fired_;
};

}  // namespace spillover::emulator
