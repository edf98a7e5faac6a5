// The Python module spillover_torch_adapter. pyruntime/spillover/allocator calls it once; Python
// holds the GIL.
#include <c10/core/AllocatorConfig.h>
#include <c10/cuda/CUDAAllocatorConfig.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "torch_adapter/allocator.hpp"
#include "torch_adapter/pool.hpp"

namespace spillover::torch_adapter {
namespace {

using cuda_allocator::CUDAAllocator;

// torch ignores a registration of lower priority than the last, in silence; its own has 0 or 1.
constexpr uint8_t kPriorityHighest = 255;

// Takes over the settings that torch has parsed and the pools can honour.
void take_over_settings() {
  const std::vector<size_t> divisions =
      c10::CachingAllocator::AcceleratorAllocatorConfig::roundup_power2_divisions();
  TORCH_CHECK(divisions.size() == SPILLOVER_ROUNDING_INTERVALS,
              "torch's setting roundup_power2_divisions has ", divisions.size(), " intervals, not ",
              int{SPILLOVER_ROUNDING_INTERVALS});
  check_pool(spillover_round_sizes(divisions.data()), "roundup_power2_divisions");
  const bool reuses = cuda_allocator::CUDAAllocatorConfig::graph_capture_record_stream_reuse();
  check_pool(spillover_reuse_in_capture(reuses ? 1 : 0), "graph_capture_record_stream_reuse");
}

std::shared_ptr<CUDAAllocator> make_allocator() {
  TORCH_CHECK(spillover_abi_version() == SPILLOVER_ABI_VERSION,
              "spillover's PyTorch part was compiled for version ", SPILLOVER_ABI_VERSION,
              " of its core library, which has version ", spillover_abi_version(),
              "; run 'spillover build --clean'");
  // torch reads its settings at first use and compares "backend" with the allocator's name then:
  // with its own, which it has been until now.
  c10::CachingAllocator::AcceleratorAllocatorConfig::instance();
  cuda_allocator::CUDAAllocatorConfig::instance();
  take_over_settings();
  // The instance outlives every owner, so that nothing is deleted when torch lets go of it.
  return {&Allocator::instance(), [](CUDAAllocator*) {}};
}

// torch.accelerator finds the allocator through this table, which changing torch.cuda's allocator
// does not touch.
void register_for_accelerator() {
  c10::SetAllocator(c10::DeviceType::CUDA, &Allocator::instance(), kPriorityHighest);
  TORCH_CHECK(c10::GetAllocator(c10::DeviceType::CUDA) == &Allocator::instance(),
              "torch has not accepted spillover's allocator for torch.accelerator");
}

// Has a Python function see each text that torch's settings are changed by, before torch's parser
// for CUDA does; that gets what the function returns. Both come after the parser of what all of
// torch's allocators have in common.
void watch_settings(pybind11::function watcher) {
  auto& hook = c10::CachingAllocator::AcceleratorAllocatorConfig::getConfigParserHook();
  // Leaked: the hook outlives the interpreter.
  auto* const held = new pybind11::function(std::move(watcher));
  hook = [held, parse = hook](const std::string& settings) {
    std::string remaining;
    {
      const pybind11::gil_scoped_acquire gil;
      remaining = (*held)(settings).cast<std::string>();
    }
    if (parse && !remaining.empty()) parse(remaining);
    take_over_settings();
  };
}

}  // namespace

PYBIND11_MODULE(spillover_torch_adapter, module) {
  module.doc() = "Spillover's pool as torch's CUDA allocator.";
  module.def("make_allocator", &make_allocator,
             "The allocator, for torch.cuda.memory._CUDAAllocator.");
  module.def("register_for_accelerator", &register_for_accelerator,
             "Make the allocator that of torch.accelerator too.");
  module.def("watch_settings", &watch_settings, pybind11::arg("watcher"),
             "Have a function see and filter every change of torch's allocator settings.");
}

}  // namespace spillover::torch_adapter
