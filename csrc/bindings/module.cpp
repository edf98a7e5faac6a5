// The Python module spillover._core. Importing it loads no CUDA driver: each function does when it
// is first called.
#include "bindings/bindings.hpp"

PYBIND11_MODULE(_core, module) {
  module.doc() = "Compiled core of spillover; use the package's public modules instead.";
  spillover::register_errors(module);
  spillover::register_driver(module);
  spillover::register_allocator(module);
  spillover::register_plain_adapter(module);
  spillover::register_dlpack(module);
  spillover::register_trace(module);
  spillover::register_host_pool(module);
  spillover::register_tiers(module);
  spillover::register_transfer(module);
  spillover::register_optim(module);
  spillover::register_gpu_direct(module);
  spillover::register_durable_store(module);
  spillover::register_storage_faults(module);
  spillover::register_simulated_disk(module);
}
