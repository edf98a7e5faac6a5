// Gives kernels that were compiled for the host (dialect.hpp) to the emulated device under their
// names, with what they touch:
//
//   #include "emulator/host_kernels/registration.hpp"
//   #include "scale.cu"
//
//   extern "C" int spillover_register_host_kernels() {
//     using namespace spillover::host_kernels;
//     return register_kernel<scale, [](const Shape&, float* values, float, unsigned n) -> Ranges {
//       return {writes(values, n * sizeof(float))};
//     }>("scale");
//   }
//
// A kernel's parameters are values and pointers; pointers inside of structures are not translated,
// so such a kernel takes them one by one. The emulated driver must be loaded and initialised.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "emulator/core/kernel_api.h"
#include "emulator/host_kernels/dialect.hpp"

namespace spillover::host_kernels {

using Shape = spillover_emulator_launch_shape;
using Ranges = std::vector<spillover_emulator_range>;

inline spillover_emulator_range reads(const void* pointer, std::size_t size_bytes) {
  return {pointer, size_bytes, 0};
}
inline spillover_emulator_range writes(const void* pointer, std::size_t size_bytes) {
  return {pointer, size_bytes, 1};
}

// The emulated driver's interface, which a real driver does not have.
struct DeviceInterface {
  decltype(&spillover_emulator_host_pointer) host_pointer = nullptr;
  decltype(&spillover_emulator_register_kernel) register_kernel = nullptr;
  decltype(&spillover_emulator_declare_accesses) declare_accesses = nullptr;

  static const DeviceInterface& instance() {
    static const DeviceInterface found = [] {
      DeviceInterface loaded;
      void* const driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
      if (driver == nullptr) return loaded;
      find(driver, "spillover_emulator_host_pointer", loaded.host_pointer);
      find(driver, "spillover_emulator_register_kernel", loaded.register_kernel);
      find(driver, "spillover_emulator_declare_accesses", loaded.declare_accesses);
      return loaded;
    }();
    return found;
  }

 private:
  template <typename Function>
  static void find(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
  }
};

// Runs body for every thread of every block.
template <typename Body>
void run_grid(const Shape& shape, Body&& body) {
  blockDim = dim3(shape.block[0], shape.block[1], shape.block[2]);
  gridDim = dim3(shape.grid[0], shape.grid[1], shape.grid[2]);
  const dim3 block = blockDim;
  Block threads(
      block.x * block.y * block.z,
      [block](unsigned index) {
        threadIdx = {index % block.x, index / block.x % block.y, index / (block.x * block.y)};
      },
      std::forward<Body>(body));
  for (unsigned z = 0; z < shape.grid[2]; ++z) {
    for (unsigned y = 0; y < shape.grid[1]; ++y) {
      for (unsigned x = 0; x < shape.grid[0]; ++x) {
        blockIdx = {x, y, z};
        threads.run();
      }
    }
  }
}

template <auto kKernel, auto kAccesses, typename Function = decltype(kKernel)>
struct HostKernel;

template <auto kKernel, auto kAccesses, typename... Parameters>
struct HostKernel<kKernel, kAccesses, void (*)(Parameters...)> {
  using Values = std::tuple<std::remove_cv_t<Parameters>...>;

  static int add(const char* name) {
    const DeviceInterface& device = DeviceInterface::instance();
    if (device.declare_accesses == nullptr) return 801;  // CUDA_ERROR_NOT_SUPPORTED
    static constexpr std::array<std::size_t, sizeof...(Parameters)> kBytes{sizeof(Parameters)...};
    const int added = device.register_kernel(name, &run, nullptr, kBytes.data(), kBytes.size());
    return added != 0 ? added : device.declare_accesses(name, &accesses, nullptr);
  }

 private:
  static Values values(void** parameters) {
    return [&]<std::size_t... kIndex>(std::index_sequence<kIndex...>) {
      return Values(*static_cast<std::tuple_element_t<kIndex, Values>*>(parameters[kIndex])...);
    }(std::index_sequence_for<Parameters...>());
  }

  template <typename Value>
  static void translate(Value& value) {
    if constexpr (std::is_pointer_v<Value>) {
      value = static_cast<Value>(DeviceInterface::instance().host_pointer(value));
    }
  }

  static void run(void** parameters, const Shape* shape, void*) {
    Values translated = values(parameters);
    std::apply([](auto&... value) { (translate(value), ...); }, translated);
    run_grid(*shape, [&] { std::apply(kKernel, translated); });
  }

  static std::size_t accesses(void** parameters, const Shape* shape, void*,
                              spillover_emulator_range* ranges, std::size_t capacity) {
    const Ranges touched = std::apply(
        [&](const auto&... value) { return kAccesses(*shape, value...); }, values(parameters));
    std::copy_n(touched.begin(), std::min(touched.size(), capacity), ranges);
    return touched.size();
  }
};

// kAccesses(shape, arguments...) -> Ranges. Returns 0, or a CUresult.
template <auto kKernel, auto kAccesses>
int register_kernel(const char* name) {
  return HostKernel<kKernel, kAccesses>::add(name);
}

}  // namespace spillover::host_kernels
