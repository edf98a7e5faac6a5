#include "driver/function_table.hpp"

#include <dlfcn.h>

#include <atomic>
#include <mutex>
#include <string>

#include "base/error.hpp"
#include "driver/check_result.hpp"
#include "driver/fork_guard.hpp"

namespace spillover {
namespace {

using GetProcAddress = CUresult(CUDAAPI*)(const char*, void**, int, cuuint64_t,
                                          CUdriverProcAddressQueryResult*);

std::mutex g_load_mutex;
DriverFunctions g_functions;  // Written under g_load_mutex, read once g_is_ready is set.
std::atomic<bool> g_is_ready{false};

void* open_driver() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* reason = dlerror();
    throw DriverError(std::string("no CUDA driver found (libcuda.so.1): ") +
                          (reason != nullptr ? reason : "dlopen failed") +
                          "; install the NVIDIA driver, or use spillover.emulator to run without a "
                          "GPU",
                      CUDA_ERROR_NOT_INITIALIZED);
  }
  return library;
}

template <class Function>
void fill(GetProcAddress get_address, const char* name, int version, Function& slot) {
  void* address = nullptr;
  const CUresult result =
      get_address(name, &address, version, CU_GET_PROC_ADDRESS_DEFAULT, nullptr);
  slot = result == CUDA_SUCCESS ? reinterpret_cast<Function>(address) : nullptr;
}

void load() {
  std::lock_guard lock(g_load_mutex);
  if (g_is_ready.load(std::memory_order_relaxed)) return;
  void* library = open_driver();
  auto get_address = reinterpret_cast<GetProcAddress>(dlsym(library, "cuGetProcAddress_v2"));
  if (get_address == nullptr) {
    throw DriverError(
        "the installed CUDA driver is older than 12.0 (it has no cuGetProcAddress_v2); install a "
        "newer NVIDIA driver",
        CUDA_ERROR_NOT_SUPPORTED);
  }
  DriverFunctions functions;
#define SPILLOVER_FILL_DRIVER_FUNCTION(name, introduced) \
  fill(get_address, #name, introduced, functions.p_##name);
  SPILLOVER_DRIVER_FUNCTIONS(SPILLOVER_FILL_DRIVER_FUNCTION)
#undef SPILLOVER_FILL_DRIVER_FUNCTION
  g_functions = functions;
  const CUresult result = require_function(functions.p_cuInit, "cuInit")(0);
  if (result != CUDA_SUCCESS) {
    std::string message =
        "the CUDA driver did not start: " + describe_failure(functions, "cuInit", result);
    // Our own fork guard knows only forks after our first call; others may have started the driver.
    if (result == CUDA_ERROR_NOT_INITIALIZED) {
      message += "; a forked child of a process that has initialised CUDA cannot use it";
    }
    throw DriverError(message, static_cast<int>(result));
  }
  watch_forks();
  g_is_ready.store(true, std::memory_order_release);
}

}  // namespace

const DriverFunctions& driver_functions() {
  if (in_forked_child()) [[unlikely]]
    check_not_forked();
  if (!g_is_ready.load(std::memory_order_acquire)) [[unlikely]]
    load();
  return g_functions;
}

const DriverFunctions* driver_functions_if_usable() noexcept {
  if (in_forked_child() || !g_is_ready.load(std::memory_order_acquire)) return nullptr;
  return &g_functions;
}

void throw_missing_function(const char* name) {
  throw DriverError(
      std::string("the installed CUDA driver has no ") + name + "; install a newer NVIDIA driver",
      CUDA_ERROR_NOT_SUPPORTED);
}

}  // namespace spillover
